// Runs every native op over odd shapes, layouts, dtypes, instruction sets and thread counts, and two callers at once.
// A sanitizer does the judging; sums and products are held to float64 besides, so that a run that computes nothing
// cannot pass.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "cpu/contrastive.h"
#include "cpu/isa.h"
#include "cpu/vocab_passes.h"
#include "torch/csrc/stable/ops.h"

namespace {

using torch::stable::ScalarType;
using torch::stable::Tensor;

uint16_t bfloat16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
double bfloat16_value(uint16_t x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &u, 4);
  return out;
}
double value_at(const Tensor& x, int64_t i) {
  if (x.scalar_type() == ScalarType::Double) return static_cast<const double*>(x.const_data_ptr())[i];
  if (x.scalar_type() == ScalarType::Float) return static_cast<const float*>(x.const_data_ptr())[i];
  return bfloat16_value(static_cast<const uint16_t*>(x.const_data_ptr())[i]);
}

struct Random {
  std::mt19937 engine{0};
  // Numbers in [-size, size].
  Tensor numbers(std::vector<int64_t> sizes, ScalarType dtype, double size) {
    Tensor out(std::move(sizes), dtype);
    std::uniform_real_distribution<double> draw(-size, size);
    for (int64_t i = 0; i < out.numel(); ++i) {
      const double x = draw(engine);
      if (dtype == ScalarType::Double) static_cast<double*>(out.mutable_data_ptr())[i] = x;
      if (dtype == ScalarType::Float) static_cast<float*>(out.mutable_data_ptr())[i] = static_cast<float>(x);
      if (dtype == ScalarType::BFloat16)
        static_cast<uint16_t*>(out.mutable_data_ptr())[i] = bfloat16_bits(static_cast<float>(x));
    }
    return out;
  }
  // Tokens in [-1, V].
  Tensor tokens(int64_t n, int64_t V) {
    Tensor out({n}, ScalarType::Long);
    for (int64_t i = 0; i < n; ++i)
      static_cast<int64_t*>(out.mutable_data_ptr())[i] = std::uniform_int_distribution<int64_t>(-1, V)(engine);
    return out;
  }
};

struct Shape {
  int64_t n, H, V;
};

void expect(bool holds, const char* what, const Shape& shape, ScalarType dtype) {
  if (holds) return;
  std::fprintf(stderr, "wrong %s: n %ld, H %ld, V %ld, dtype %d, %s, %u threads\n", what, static_cast<long>(shape.n),
               static_cast<long>(shape.H), static_cast<long>(shape.V), static_cast<int>(dtype), synpo_isa(),
               torch::stable::get_num_threads());
  std::exit(1);
}

struct Passes {
  Shape shape;
  ScalarType dtype, acc;
  Tensor hidden, weight, bias, targets, reference, coef;
  double size;  // of hidden: large ones make rows whose reference must be raised

  Passes(const Shape& shape, ScalarType dtype, double size, bool strided, Random& random)
      : shape(shape),
        dtype(dtype),
        acc(dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float),
        hidden(random.numbers({shape.n, strided ? 2 * shape.H + 1 : shape.H}, dtype, size)),
        weight(random.numbers({shape.V, strided ? shape.H + 3 : shape.H}, dtype, 1)),
        bias(random.numbers({shape.V}, dtype, 1)),
        targets(random.tokens(shape.n, shape.V)),
        reference(random.numbers({shape.n}, acc, 1)),
        coef(random.numbers({shape.n}, acc, 1)),
        size(size) {
    if (strided) {
      hidden = hidden.columns(1, 2, shape.H);
      weight = weight.columns(3, 1, shape.H);
    }
  }

  void run(int64_t workspace_mb, double softcap) const {
    const auto [n, H, V] = shape;
    const auto [shift, sums, product] =
        synpo::softmax_sums(hidden, weight, bias, targets, reference, 0.5, softcap, true, workspace_mb);
    synpo::softmax_sums(hidden, weight, std::nullopt, targets, reference, 0.5, softcap, false, workspace_mb);
    for (int64_t t = 0; t < n; t += n / 3 + 1) check_row(t, softcap, shift, sums, product);

    Tensor log_norm({n}, acc), grad_weight({V, H}, acc), grad_bias({V}, acc);
    for (int64_t t = 0; t < n; ++t) {
      const double value = value_at(shift, t) + std::log(std::max(value_at(sums, t), 1e-30));
      if (acc == ScalarType::Double) static_cast<double*>(log_norm.mutable_data_ptr())[t] = value;
      if (acc == ScalarType::Float) static_cast<float*>(log_norm.mutable_data_ptr())[t] = static_cast<float>(value);
    }
    const Tensor probabilities = synpo::softmax_grads(hidden, weight, bias, targets, log_norm, coef, 0.5, softcap,
                                                      grad_weight, grad_bias, true, workspace_mb);
    Tensor tile({n, V}, acc), narrow({n, V}, ScalarType::BFloat16);
    synpo::softmax_store(hidden, weight, bias, targets, log_norm, 0.5, softcap, narrow);
    synpo::softmax_store(hidden, weight, bias, targets, log_norm, 0.5, softcap, tile);
    const Tensor again = synpo::tile_grads(tile, hidden, weight, coef, grad_weight, grad_bias, true);
    synpo::tile_grads(narrow, hidden, weight, coef, std::nullopt, grad_bias, false);
    for (int64_t i = 0; i < n * H; ++i)
      expect(std::abs(value_at(again, i) - value_at(probabilities, i)) <= 0.02, "product of the tile", shape, dtype);
  }

  // sums and product of row t in float64; bf16 products may round each weight by 2^-8.
  void check_row(int64_t t, double softcap, const Tensor& shift, const Tensor& sums, const Tensor& product) const {
    const auto [n, H, V] = shape;
    const auto element = [&](const Tensor& x, int64_t i, int64_t j) {
      return value_at(x, i * x.stride(0) + j * x.stride(1));
    };
    double sum = 0;
    std::vector<double> out(H), magnitude(H);
    for (int64_t v = 0; v < V; ++v) {
      if (v == static_cast<const int64_t*>(targets.const_data_ptr())[t]) continue;
      double z = value_at(bias, v);
      for (int64_t h = 0; h < H; ++h) z += element(hidden, t, h) * element(weight, v, h);
      z *= 0.5;
      double d = 0.5;
      if (softcap > 0) {
        z = softcap * std::tanh(z / softcap);
        d *= 1 - z / softcap * (z / softcap);
      }
      const double e = std::exp(z - value_at(shift, t));
      sum += e;
      for (int64_t h = 0; h < H; ++h) {
        out[h] += e * d * element(weight, v, h);
        magnitude[h] += std::abs(e * element(weight, v, h));
      }
    }
    const double relative = 2e-5 * (1 + size * std::sqrt(static_cast<double>(H)));
    expect(std::abs(value_at(sums, t) - sum) <= relative * sum, "sum", shape, dtype);
    for (int64_t h = 0; h < H; ++h) {
      const double allowed = (relative + (dtype == ScalarType::BFloat16 ? 0x1p-8 : 0)) * magnitude[h];
      expect(std::abs(value_at(product, t * H + h) - out[h]) <= allowed, "product", shape, dtype);
    }
  }
};

void run_contrastive(int64_t B, int64_t V, ScalarType dtype, Random& random) {
  const Tensor logits = random.numbers({B, V}, dtype, 8), contrast = random.numbers({B, V}, dtype, 8);
  const Tensor seeds = random.tokens(B, 1000);
  const auto greedy = synpo::contrastive_sample(logits, contrast, seeds, 0, 0.5, 0.1, 0.0, 0, 1.0);
  synpo::contrastive_sample(logits, contrast, seeds, 1, 0.5, 0.1, 0.7, 5, 0.9);
  synpo::contrastive_sample(logits, std::nullopt, seeds, 2, 0.5, 0.0, 1.0, 0, 1.0);
  synpo::contrastive_sample(logits, contrast, seeds, 3, 0.5, 0.0, 1.0, 100, 0.5);
  synpo::contrastive_logits(logits, contrast, 0.5, 0.1);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t token = static_cast<const int64_t*>(std::get<0>(greedy).const_data_ptr())[b];
    expect(token >= 0 && token < V, "token", {B, 0, V}, dtype);
  }
}

}  // namespace

int main() {
  const Shape shapes[] = {{0, 5, 7},    {1, 1, 1},     {1, 0, 9},    {2, 1, 3},     {3, 2, 257},
                          {5, 1, 513},  {7, 33, 255},  {97, 33, 65}, {13, 257, 511}, {2, 130, 1100},
                          {100, 640, 90}, {195, 9, 1300}};
  const ScalarType dtypes[] = {ScalarType::Double, ScalarType::Float, ScalarType::BFloat16};
  int runs = 0;
  Random random;
  for (const char* isa : {"portable", "portable_pairs", "avx2", "avx2_pairs", "avx512", "avx512_bf16"}) {
    if (synpo_force_isa(isa)) continue;
    for (const ScalarType dtype : dtypes) {
      for (const Shape& shape : shapes) {
        const bool strided = ++runs % 2 == 0;
        torch::stable::num_threads = 1 + runs % 4;
        Passes(shape, dtype, 1, strided, random).run(runs % 3 ? 1 : 64, runs % 5 ? 0.0 : 4.0);
        Passes(shape, dtype, 60, !strided, random).run(1, 0.0);
      }
      if (dtype == ScalarType::Double) continue;
      for (const int64_t V : {1, 17, 2049, 5000}) run_contrastive(3, V, dtype, random);
    }
    const Passes shared({65, 40, 1500}, ScalarType::Float, 1, false, random);
    std::thread other([&] { shared.run(1, 0.0); });
    shared.run(1, 0.0);
    other.join();
    std::printf("%s: done\n", isa);
  }
  synpo_force_isa("");
  std::printf("%d problems\n", runs);
}
