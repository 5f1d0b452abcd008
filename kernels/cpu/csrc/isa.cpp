// Compiled once for each instruction set, with -DISA=NAME: the function NAME() gives its table.

#include "loops.h"

namespace smoothq {

const Table* ISA() { return &TABLE; }

}  // namespace smoothq
