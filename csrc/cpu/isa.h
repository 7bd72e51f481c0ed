// Which instruction set runs.
#pragma once

#include "tile_kernels.h"

namespace synpo {

// The best one this processor supports, or the one a test forced.
const Isa& current_isa();

}  // namespace synpo

// The C interface that native.py reads through ctypes.
extern "C" {
#pragma GCC visibility push(default)
const char* synpo_isa();
// Forces an instruction set by name; "" gives the choice back. 0 when done, 1 when unknown or unsupported here.
int synpo_force_isa(const char* name);
#pragma GCC visibility pop
}
