#include "isa.h"

#include <atomic>
#include <cstring>

namespace synpo {
namespace {

struct Choice {
  const Isa* isa;
  bool supported;
  bool automatic;  // the emulated pairs exist to test the packing; they are never the best
};

// Best first.
const Choice* choices(int* count) {
#if defined(__x86_64__)
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const Choice all[] = {{&kAvx512Bf16, bf16, true},   {&kAvx512, avx512, true},   {&kAvx2, avx2, true},
                               {&kPortable, true, true},     {&kAvx2Pairs, avx2, false}, {&kPortablePairs, true, false}};
#else
  static const Choice all[] = {{&kPortable, true, true}, {&kPortablePairs, true, false}};
#endif
  *count = sizeof all / sizeof all[0];
  return all;
}

std::atomic<const Isa*> forced{nullptr};

}  // namespace

const Isa& current_isa() {
  if (const Isa* isa = forced.load()) return *isa;
  int count = 0;
  const Choice* all = choices(&count);
  int best = 0;
  while (!(all[best].supported && all[best].automatic)) ++best;
  return *all[best].isa;
}

}  // namespace synpo

extern "C" {
const char* synpo_isa() { return synpo::current_isa().name; }

int synpo_force_isa(const char* name) {
  if (!*name) {
    synpo::forced = nullptr;
    return 0;
  }
  int count = 0;
  const synpo::Choice* all = synpo::choices(&count);
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(all[i].isa->name, name) == 0 && all[i].supported) {
      synpo::forced = all[i].isa;
      return 0;
    }
  }
  return 1;
}
}
