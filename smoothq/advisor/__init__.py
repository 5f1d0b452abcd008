"""What `plan` and `models` answer beside a plan: who can run it, and what it costs there."""
