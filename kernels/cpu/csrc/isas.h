// Which instruction set runs: the best that the processor has, or the one that is asked for.

#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace smoothq {

// The table that runs: the best that the processor has, or the one that SMOOTHQ_CPU_ISA names.
// Throws std::invalid_argument for a name that is none, or that the processor does not have.
const Table& table();

// Makes another table run from now on: for tests and comparisons. Throws as `table`.
void use(const std::string& name);

// Names of all that this processor has, the best first.
std::vector<std::string> runnable();

}  // namespace smoothq
