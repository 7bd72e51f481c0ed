// Contrastive decoding on the CPU: one pass over the rows in vectors, then a second look at a few groups of tokens.
//
// The pass gives, for each block of a row, the softmax sums of l and (for plain sampling and for top-p alone) of c, and
// for each group of 128 tokens the largest c. From there, for one row:
//
//   greedy          the first group whose top is the row's
//   plain sampling  the block in which u falls, then the token in that block
//   top-k           what k groups' tops reach is a floor of the k-th largest c: only groups that reach it are combined
//                   again, k or a few more of them, for any k
//   top-p alone     the same with k = 64; the sums tell whether these candidates hold enough of the mass, else 8 k
//   plausibility    the pass reads l alone: its maximum gives the floor, and both views are read again only in groups
//                   that hold a plausible token
#include "contrastive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "dtypes.h"
#include "isa.h"
#include "row_kernels.h"
#include "threads.h"
#include "vector.h"

namespace synpo {
namespace {

using torch::headeronly::ScalarType;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint8_t kOk = 0, kNotFinite = 1, kAllMasked = 2;
constexpr int64_t kSpan = 4;  // blocks of a task: 5 us of work beside 0.1 us for taking it
constexpr int64_t kStep = 16;  // tokens asked about together
constexpr int64_t kFirstCandidates = 64, kMoreCandidates = 8;  // top-p alone: groups first looked at, and their growth

// Words 0 and 1 of Philox4x32-10 (Salmon et al. 2011) as a multiple of 2^-53 in [0, 1).
double philox(uint64_t key, uint64_t counter) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t x0 = static_cast<uint32_t>(counter), x1 = static_cast<uint32_t>(counter >> 32), x2 = 0, x3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{x0} * 0xD2511F53u, b = uint64_t{x2} * 0xCD9E8D57u;
    x0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(b);
    x2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>((uint64_t{x0 >> 5} << 26) + (x1 >> 6)) * 0x1p-53;
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of both views.
struct Views {
  int64_t B, V;
  const char* logits;
  const char* contrast;
  int64_t stride, contrast_stride;  // bytes
  Dtype dtype;

  Views(const Tensor& full, const std::optional<Tensor>& other) : B(full.size(0)), V(full.size(1)) {
    STD_TORCH_CHECK(full.dim() == 2 && full.stride(1) == 1, "logits must be (B, V) with neighbouring tokens side by side");
    STD_TORCH_CHECK(V >= 1 && V <= std::numeric_limits<int32_t>::max(), "logits must have 1 to 2^31 - 1 columns");
    dtype = dtype_of(full, "logits");
    logits = static_cast<const char*>(full.const_data_ptr());
    stride = full.stride(0) * full.element_size();
    contrast = nullptr;
    contrast_stride = 0;
    if (other) {
      STD_TORCH_CHECK(other->dim() == 2 && other->size(0) == B && other->size(1) == V && other->stride(1) == 1 &&
                          other->scalar_type() == full.scalar_type(),
                      "contrast must have the shape and dtype of logits");
      contrast = static_cast<const char*>(other->const_data_ptr());
      contrast_stride = other->stride(0) * other->element_size();
    }
  }
  Row row(int64_t b) const {
    return {logits + b * stride, contrast ? contrast + b * contrast_stride : nullptr, dtype};
  }
  Row logits_row(int64_t b) const { return {logits + b * stride, nullptr, dtype}; }
  float logit(int64_t b, int64_t token) const {
    const char* data = logits + b * stride;
    switch (dtype) {
      case Dtype::kBFloat16:
        return from_bfloat16(reinterpret_cast<const uint16_t*>(data)[token]);
      case Dtype::kFloat16:
        return from_float16(reinterpret_cast<const uint16_t*>(data)[token]);
      default:
        return reinterpret_cast<const float*>(data)[token];
    }
  }
};

struct Law {
  double alpha, plausibility, temperature;
  int64_t top_k;
  double top_p;

  bool greedy() const { return temperature == 0; }
  bool ordered() const { return !greedy() && (top_k > 0 || top_p < 1); }
  bool plain() const { return !greedy() && !ordered(); }
  // As inverse_temperature in contrastive.py: neither 0 * inf nor inf * 0 can appear.
  float scale() const {
    return static_cast<float>(std::clamp(1 / std::max(temperature, 0x1p-126), 0x1p-126, 0x1p126));
  }
  Combination combination(float floor) const {
    return {static_cast<float>(1 + alpha), static_cast<float>(alpha), floor};
  }
};

struct Candidate {
  float c;
  int32_t token;
  bool operator<(const Candidate& other) const { return c > other.c || (c == other.c && token < other.token); }
};

struct Drawn {
  int64_t token;
  double logp;
};

// What the pass left of one row, and the draw from it.
class RowDraw {
 public:
  RowDraw(const RowKernels& kernels, const Views& views, const Law& law, int64_t b, const BlockSums* blocks,
          const float* group_tops)
      : kernels_(kernels),
        law_(law),
        row_(views.row(b)),
        V_(views.V),
        blocks_(blocks),
        group_tops_(group_tops),
        combination_(law.combination(-kInfinity)) {
    for (int64_t i = 0; i < block_count(); ++i) {
      finite_ &= blocks[i].finite;
      l_top_ = std::max(l_top_, blocks[i].l_top);
      c_top_ = std::max(c_top_, blocks[i].c_top);
    }
    for (int64_t i = 0; i < block_count(); ++i)
      if (blocks[i].l_sum > 0) l_sum_ += blocks[i].l_sum * std::exp(double{blocks[i].l_top} - l_top_);
    // The same rounding as in the definition: float32 maximum plus float32 logarithm.
    if (law.plausibility > 0) combination_.floor = l_top_ + static_cast<float>(std::log(law.plausibility));
  }

  double log_norm() const { return l_top_ + std::log(l_sum_); }

  // The status; *drawn is set when it is kOk.
  uint8_t draw(double u, Drawn* drawn) {
    if (!finite_) return kNotFinite;
    if (law_.plausibility > 0) {
      gather(combination_.floor);
      if (!finite_) return kNotFinite;
      if (candidates_.empty()) return kAllMasked;
      if (law_.ordered()) {
        keep_first(law_.top_k > 0 ? law_.top_k : size());
        *drawn = pick(truncate(0), u);
      } else if (law_.greedy()) {
        *drawn = {std::min_element(candidates_.begin(), candidates_.end())->token, 0};
      } else {
        *drawn = pick(size(), u);
      }
      return kOk;
    }
    if (!(c_top_ > -kInfinity)) return kAllMasked;
    if (law_.greedy()) {
      gather(c_top_);
      *drawn = {candidates_.front().token, 0};
    } else if (law_.plain()) {
      *drawn = pick_through_blocks(u);
    } else if (law_.top_k > 0) {
      gather(reached_by(law_.top_k));
      keep_first(law_.top_k);
      *drawn = pick(truncate(0), u);
    } else {
      *drawn = pick(gather_mass(), u);
    }
    return kOk;
  }

 private:
  int64_t block_count() const { return divide_up(V_, kBlock); }
  int64_t group_count() const { return divide_up(V_, kGroup); }
  int64_t size() const { return static_cast<int64_t>(candidates_.size()); }

  // A number that the tops of n groups reach, and of few more; -inf where there are no n. Bisection over the floats in
  // their order: a count of all tops is vectors without a branch, 0.1 us, where a selection mispredicts at every other.
  float reached_by(int64_t n) const {
    if (n > group_count()) return -kInfinity;
    int64_t low = key(-kInfinity), high = key(c_top_) + 1;  // n reach low, fewer reach high
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      const int64_t count = groups_reaching(from_key(middle));
      (count >= n ? low : high) = middle;
      if (count >= n && count <= n + n / 8) break;
    }
    return from_key(low);
  }
  int32_t groups_reaching(float threshold) const {
    int32_t count = 0;
    for (int64_t i = 0; i < group_count(); ++i) count += group_tops_[i] >= threshold;
    return count;
  }
  // Integers in the order of the floats, but for -0, which stands below 0, and back.
  static int32_t flip(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }
  static int64_t key(float x) { return flip(bits<int32_t>(x)); }
  static float from_key(int64_t key) { return bits<float>(flip(static_cast<int32_t>(key))); }

  // Candidates: the tokens that are not masked, with c >= threshold (with a plausibility constraint: all that pass it),
  // by id. Only groups that reach the threshold are read.
  void gather(float threshold) {
    candidates_.clear();
    const float smallest = law_.plausibility > 0 ? -kInfinity : threshold;
    alignas(64) float c[kGroup];
    for (int64_t group = 0; group < group_count(); ++group) {
      if (group_tops_[group] < threshold) continue;
      const int64_t begin = group * kGroup, count = std::min(kGroup, V_ - begin);
      finite_ &= kernels_.combine(row_, combination_, begin, count, c);
      for (int64_t first = 0; first < count; first += kStep) {
        // Most steps hold no candidate: asked of all at once, in vectors. c is -inf behind the row's end.
        int32_t hits = 0;
        for (int64_t i = 0; i < kStep; ++i) hits |= (c[first + i] >= smallest) & (c[first + i] > -kInfinity);
        if (!hits) continue;
        for (int64_t i = first; i < first + kStep; ++i)
          if (c[i] >= smallest && c[i] > -kInfinity) candidates_.push_back({c[i], static_cast<int32_t>(begin + i)});
      }
    }
  }

  // The first n candidates in order of c.
  void keep_first(int64_t n) {
    if (n < size()) {
      std::nth_element(candidates_.begin(), candidates_.begin() + (n - 1), candidates_.end());
      candidates_.resize(n);
    }
    std::sort(candidates_.begin(), candidates_.end());
  }

  void weigh() {
    const int64_t padded = divide_up(size(), kGroup) * kGroup;
    weights_.assign(padded, -kInfinity);
    float top = -kInfinity;
    for (int64_t i = 0; i < size(); ++i) {
      weights_[i] = candidates_[i].c;
      top = std::max(top, candidates_[i].c);
    }
    top_ = top;
    kernels_.weights(weights_.data(), padded, top, law_.scale());
  }

  // Under top-p: how many of the sorted candidates stay. total: the mass of the law before top-p; 0: the candidates'.
  int64_t truncate(double total) {
    weigh();
    if (law_.top_p == 1) return size();
    if (total == 0)
      for (int64_t i = 0; i < size(); ++i) total += weights_[i];
    double above = 0;
    int64_t kept = 0;
    for (; kept < size() && above < law_.top_p * total; ++kept) above += weights_[kept];
    return kept;
  }

  // top-p alone: as many candidates as hold the mass, sorted; returns how many of them stay.
  int64_t gather_mass() {
    double total = 0;
    for (int64_t i = 0; i < block_count(); ++i) total += block_weight(i);
    for (int64_t n = kFirstCandidates;; n *= kMoreCandidates) {
      const float threshold = reached_by(n);
      gather(threshold);
      std::sort(candidates_.begin(), candidates_.end());
      const int64_t kept = truncate(total);
      if (kept < size() || !(threshold > -kInfinity)) return kept;
    }
  }

  double block_weight(int64_t i) const {
    return blocks_[i].c_sum > 0 ? blocks_[i].c_sum * std::exp((double{blocks_[i].c_top} - c_top_) * law_.scale()) : 0;
  }

  // Plain sampling: the block by the blocks' sums, then the token inside it.
  Drawn pick_through_blocks(double u) {
    double total = 0;
    for (int64_t i = 0; i < block_count(); ++i) total += block_weight(i);
    double rest = u * total;
    int64_t chosen = 0;
    for (int64_t i = 0; i < block_count(); ++i) {
      const double weight = block_weight(i);
      if (weight > 0) chosen = i;
      if (rest < weight) break;
      rest -= weight;
    }
    const float top = blocks_[chosen].c_top;
    alignas(64) float c[kBlock], w[kBlock];
    const int64_t begin = chosen * kBlock, count = std::min(kBlock, V_ - begin);
    kernels_.combine(row_, combination_, begin, count, c);
    std::copy(c, c + divide_up(count, kGroup) * kGroup, w);
    kernels_.weights(w, divide_up(count, kGroup) * kGroup, top, law_.scale());
    rest /= std::exp((double{top} - c_top_) * law_.scale());
    const int64_t i = invert(w, count, rest);
    return {begin + i, (double{c[i]} - c_top_) * law_.scale() - std::log(total)};
  }

  // The first token at which the running sum passes `target`; the last one with a weight where rounding let none.
  static int64_t invert(const float* weights, int64_t count, double target) {
    int64_t last = 0;
    double running = 0;
    for (int64_t i = 0; i < count; ++i) {
      running += weights[i];
      if (weights[i] > 0) last = i;
      if (running > target) return i;
    }
    return last;
  }

  // A draw from the first `kept` candidates in the order they lie in.
  Drawn pick(int64_t kept, double u) {
    if (!law_.ordered()) weigh();
    double total = 0;
    for (int64_t i = 0; i < kept; ++i) total += weights_[i];
    const int64_t i = invert(weights_.data(), kept, u * total);
    return {candidates_[i].token, (double{candidates_[i].c} - top_) * law_.scale() - std::log(total)};
  }

  const RowKernels& kernels_;
  const Law& law_;
  const Row row_;
  const int64_t V_;
  const BlockSums* blocks_;
  const float* group_tops_;
  Combination combination_;
  bool finite_ = true;
  float l_top_ = -kInfinity, c_top_ = -kInfinity, top_ = 0;
  double l_sum_ = 0;
  std::vector<Candidate> candidates_;
  std::vector<float> weights_;
};

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// float64 serves gradient checks: plain loops.
void combine_float64(const Views& views, double alpha, double plausibility, double* out) {
  constexpr double lowest = -std::numeric_limits<double>::infinity();
  for (int64_t b = 0; b < views.B; ++b) {
    const auto* l = reinterpret_cast<const double*>(views.logits + b * views.stride);
    const auto* other = reinterpret_cast<const double*>(views.contrast + b * views.contrast_stride);
    double top = lowest;  // the largest number: a NaN makes no token implausible
    for (int64_t v = 0; v < views.V; ++v) top = l[v] > top ? l[v] : top;
    const double floor = top + std::log(plausibility);
    for (int64_t v = 0; v < views.V; ++v, ++out) {
      const bool masked = l[v] == lowest || other[v] == lowest || (plausibility > 0 && l[v] < floor);
      *out = masked ? lowest : (1 + alpha) * l[v] - alpha * other[v];
    }
  }
}

}  // namespace

Tensor contrastive_logits(const Tensor& logits, const Tensor& contrast, double alpha, double plausibility) {
  const Views views(logits, contrast);
  const bool wide = views.dtype == Dtype::kFloat64;
  Tensor out = torch::stable::new_zeros(logits, {views.B, views.V}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    combine_float64(views, alpha, plausibility, data_of<double>(out));
    return out;
  }
  const RowKernels& kernels = *current_isa().rows;
  const Law law{alpha, plausibility, 1.0, 0, 1.0};
  const int64_t blocks = divide_up(views.V, kBlock);
  std::vector<float> floors(views.B, -kInfinity);
  if (plausibility > 0) {
    std::vector<BlockSums> sums(views.B * blocks);
    run_tasks(thread_count(), views.B * blocks, [&](int64_t task, int64_t) {
      const int64_t begin = task % blocks * kBlock;
      float group_tops[kBlock / kGroup];
      kernels.scan(views.logits_row(task / blocks), law.combination(-kInfinity), begin,
                   std::min(kBlock, views.V - begin), 0.0f, &sums[task], group_tops);
    });
    for (int64_t i = 0; i < views.B * blocks; ++i) floors[i / blocks] = std::max(floors[i / blocks], sums[i].l_top);
    for (float& floor : floors) floor += static_cast<float>(std::log(plausibility));
  }
  auto* c = data_of<float>(out);
  run_tasks(thread_count(), views.B * blocks, [&](int64_t task, int64_t) {
    const int64_t b = task / blocks, begin = task % blocks * kBlock, count = std::min(kBlock, views.V - begin);
    alignas(64) float block[kBlock];
    kernels.combine(views.row(b), law.combination(floors[b]), begin, count, block);
    std::copy(block, block + count, c + b * views.V + begin);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> contrastive_sample(const Tensor& logits,
                                                              const std::optional<Tensor>& contrast,
                                                              const Tensor& seeds, int64_t step, double alpha,
                                                              double plausibility, double temperature, int64_t top_k,
                                                              double top_p) {
  const Views views(logits, contrast);
  STD_TORCH_CHECK(views.dtype != Dtype::kFloat64, "logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(seeds.dim() == 1 && seeds.size(0) == views.B && seeds.scalar_type() == ScalarType::Long,
                  "seeds must be (B,) int64");
  const Law law{alpha, plausibility, temperature, top_k, top_p};
  const RowKernels& kernels = *current_isa().rows;
  const int64_t blocks = divide_up(views.V, kBlock), groups = divide_up(views.V, kGroup);
  const Scratch<BlockSums> sums(views.B * blocks);
  const Scratch<float> group_tops(views.B * groups);
  const bool logits_alone = plausibility > 0;
  const bool mass = !logits_alone && !law.greedy() && top_k == 0;
  Tensor tokens = torch::stable::new_zeros(logits, {views.B}, ScalarType::Long);
  Tensor logps = torch::stable::new_zeros(logits, {views.B}, ScalarType::Float);
  Tensor model_logps = torch::stable::new_zeros(logits, {views.B}, ScalarType::Float);
  Tensor status = torch::stable::new_zeros(logits, {views.B}, ScalarType::Byte);
  const int64_t seed_stride = views.B ? seeds.stride(0) : 1;
  const auto* seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  const auto draw = [&](int64_t b) {
    RowDraw row(kernels, views, law, b, sums.get() + b * blocks, group_tops.get() + b * groups);
    const double u = law.greedy() ? 0 : philox(static_cast<uint64_t>(seed[b * seed_stride]), static_cast<uint64_t>(step));
    Drawn drawn{-1, 0};
    const uint8_t outcome = row.draw(u, &drawn);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    data_of<uint8_t>(status)[b] = outcome;
    data_of<int64_t>(tokens)[b] = drawn.token;
    data_of<float>(logps)[b] = outcome == kOk ? static_cast<float>(drawn.logp) : nan;
    data_of<float>(model_logps)[b] =
        outcome == kOk ? static_cast<float>(views.logit(b, drawn.token) - row.log_norm()) : nan;
  };

  // Who scans the last of a row's spans draws from it: no worker waits for the others in between.
  const int64_t spans = divide_up(blocks, kSpan);
  std::vector<std::atomic<int64_t>> left(views.B);
  for (auto& count : left) count = spans;
  run_tasks(thread_count(), views.B * spans, [&](int64_t task, int64_t) {
    const int64_t b = task / spans, first = task % spans * kSpan;
    for (int64_t block = first; block < std::min(first + kSpan, blocks); ++block)
      kernels.scan(logits_alone ? views.logits_row(b) : views.row(b), law.combination(-kInfinity), block * kBlock,
                   std::min(kBlock, views.V - block * kBlock), mass ? law.scale() : 0.0f,
                   sums.get() + b * blocks + block, group_tops.get() + b * groups + block * (kBlock / kGroup));
    if (--left[b] == 0) draw(b);
  });
  return {tokens, logps, model_logps, status};
}

}  // namespace synpo
