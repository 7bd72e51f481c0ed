#include "vocab_passes.h"

#include <cmath>
#include <string>

#include "dtypes.h"
#include "isa.h"
#include "vector.h"
#include "vocab_sweep.h"

namespace synpo {
namespace {

using torch::headeronly::ScalarType;

// Working memory of the stored form, whose ops take no bound: their caller bounds the rows.
constexpr int64_t kStoredWorkspace = 64 << 20;

Matrix matrix_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, " must be (", rows,
                  ", ", columns, ")");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), dtype_of(tensor, name)};
}

// The numbers of a vector of inputs, widened, with `padding` zeros behind them.
template <class T>
std::vector<T> numbers_of(const Tensor& tensor, const char* name, int64_t count, int64_t padding = 0) {
  STD_TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == count, name, " must have ", count, " numbers");
  std::vector<T> out(count + padding);
  const int64_t stride = count ? tensor.stride(0) : 1;
  const auto read = [&](const auto* data, const auto& widen) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(widen(data[i * stride]));
  };
  const auto same = [](auto x) { return x; };
  const void* data = tensor.const_data_ptr();
  if (tensor.scalar_type() == ScalarType::Long) {
    read(static_cast<const int64_t*>(data), same);
    return out;
  }
  switch (dtype_of(tensor, name)) {
    case Dtype::kFloat64:
      read(static_cast<const double*>(data), same);
      break;
    case Dtype::kFloat32:
      read(static_cast<const float*>(data), same);
      break;
    case Dtype::kBFloat16:
      read(static_cast<const uint16_t*>(data), from_bfloat16);
      break;
    case Dtype::kFloat16:
      read(static_cast<const uint16_t*>(data), from_float16);
      break;
  }
  return out;
}

// A result that is updated in place: contiguous, of the accumulator's dtype.
template <class Acc>
Acc* updated(const std::optional<Tensor>& tensor, const char* name, int64_t count) {
  if (!tensor) return nullptr;
  constexpr bool wide = sizeof(Acc) == 8;
  STD_TORCH_CHECK(tensor->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      tensor->is_contiguous() && tensor->numel() == count,
                  name, " must be contiguous, of ", count, " numbers, ", wide ? "float64" : "float32");
  return static_cast<Acc*>(tensor->mutable_data_ptr());
}

template <class Acc>
Tensor new_result(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_zeros(like, sizes, sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float);
}

template <class T>
Tensor result_of(const std::vector<T>& values, const Tensor& like) {
  Tensor out = new_result<T>(like, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

// The inputs that ops 1 to 3 share.
template <class Acc>
struct Head {
  int64_t n, H, V;
  Matrix hidden, weight;
  std::vector<Acc> bias;
  std::vector<int64_t> targets;
  Acc logit_scale, softcap;

  Head(const Tensor& hidden_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
       const Tensor& targets_in, double logit_scale, double softcap)
      : n(hidden_in.size(0)),
        H(hidden_in.size(1)),
        V(weight_in.size(0)),
        hidden(matrix_of(hidden_in, "hidden", n, H)),
        weight(matrix_of(weight_in, "weight", V, H)),
        targets(numbers_of<int64_t>(targets_in, "targets", n)),
        logit_scale(static_cast<Acc>(logit_scale)),
        softcap(static_cast<Acc>(softcap)) {
    // A piece of a row is padded up to the next 64 columns.
    if (bias_in) bias = numbers_of<Acc>(*bias_in, "bias", V, 64);
  }
  const Acc* bias_at(int64_t column) const { return bias.empty() ? nullptr : bias.data() + column; }
};

// The references and sums of all rows. The sums are float64: adding hundreds of float32 pieces would cost digits.
template <class Acc>
struct Running {
  std::vector<Acc> shift;
  std::vector<double> sums;
  std::vector<Acc> piece_shift, piece_sum;  // [row][piece] of the current span
  int64_t width = 0, pieces = 0;

  explicit Running(std::vector<Acc> first) : shift(std::move(first)), sums(shift.size(), 0.0) {}

  void begin(int64_t rows, int64_t columns, int64_t piece_width) {
    width = piece_width;
    pieces = divide_up(columns, width);
    piece_shift.resize(rows * pieces);
    piece_sum.resize(rows * pieces);
  }
  // Brings the pieces of the rows from row0 on to one reference each. rescale_piece(row, column, factor) and
  // rescale_row(row, factor) repair what was stored under an older reference.
  template <class RescalePiece, class RescaleRow>
  void merge(int64_t workers, int64_t row0, int64_t rows, const RescalePiece& rescale_piece,
             const RescaleRow& rescale_row) {
    const int64_t block = divide_up(1 << 15, pieces + 1);  // rows per task: a barrier costs more than fewer pieces
    run_tasks(workers, divide_up(rows, block), [&](int64_t task, int64_t) {
      for (int64_t row = task * block; row < std::min(rows, (task + 1) * block); ++row) {
        const Acc* shifts = piece_shift.data() + row * pieces;
        const Acc old = shift[row0 + row];
        Acc raised = old;
        for (int64_t p = 0; p < pieces; ++p) raised = shifts[p] > raised ? shifts[p] : raised;
        double& sum = sums[row0 + row];
        if (raised != old) {
          const Acc factor = std::exp(old - raised);
          sum *= factor;
          rescale_row(row, factor);
          shift[row0 + row] = raised;
        }
        for (int64_t p = 0; p < pieces; ++p) {
          Acc factor = 1;
          if (shifts[p] != raised) {
            factor = std::exp(shifts[p] - raised);
            rescale_piece(row, p * width, factor);
          }
          sum += static_cast<double>(piece_sum[row * pieces + p]) * factor;
        }
      }
    });
  }
  std::vector<Acc> total() const { return std::vector<Acc>(sums.begin(), sums.end()); }
};

template <class Mode>
std::tuple<Tensor, Tensor, Tensor> sums_of(const TileKernels<Mode>& kernels, const Tensor& hidden,
                                           const Tensor& weight, const std::optional<Tensor>& bias,
                                           const Tensor& targets, const Tensor& target_logits, double logit_scale,
                                           double softcap, bool weighted, int64_t workspace_mb) {
  using Acc = typename Mode::Acc;
  const Head<Acc> head(hidden, weight, bias, targets, logit_scale, softcap);
  Running<Acc> running(numbers_of<Acc>(target_logits, "target_logits", head.n));
  Tensor product_out = new_result<Acc>(hidden, {weighted ? head.n : 0, head.H});
  Acc* product = static_cast<Acc*>(product_out.mutable_data_ptr());
  VocabSweep<Mode> sweep(kernels, {head.n, head.H, head.V, weighted, false}, workspace_mb << 20);
  const RowLaw<Acc> law{head.logit_scale, head.softcap, true};

  for (int64_t row0 = 0; row0 < head.n; row0 += sweep.row_block) {
    const int64_t rows = std::min(sweep.row_block, head.n - row0);
    sweep.take_hidden(head.hidden, row0, rows);
    Acc* block_product = weighted ? product + row0 * head.H : nullptr;
    for (int64_t v = 0; v < head.V + sweep.span; v += sweep.span) {
      const int64_t columns = sweep.columns_at(v);
      running.begin(rows, columns, sweep.piece_width(rows, columns));
      const auto emit = [&](int64_t row, int64_t column, int64_t n, int64_t padded, Acc* x) {
        const int64_t piece = row * running.pieces + column / running.width;
        kernels.exp_row(x, n, padded, head.bias_at(v + column), law, running.shift[row0 + row],
                        head.targets[row0 + row] - v - column, &running.piece_shift[piece], &running.piece_sum[piece]);
        if (weighted) kernels.store_operands(x, round_up(n, kUnitSize<Mode>), sweep.tile(v, row, column));
      };
      if (!run_tasks(sweep.workers(), sweep.product(head.weight, rows, v - sweep.span, block_product),
                     sweep.logits(head.weight, rows, v, columns, emit))) {
        return {result_of(running.shift, hidden), result_of(running.total(), hidden), product_out};
      }
      running.merge(sweep.workers(), row0, rows, [&](int64_t row, int64_t column, Acc factor) {
        if (weighted) kernels.scale_operands(sweep.tile(v, row, column), running.width, factor);
      }, [&](int64_t row, Acc factor) {
        for (int64_t h = 0; weighted && h < head.H; ++h) block_product[row * head.H + h] *= factor;
      });
    }
  }
  return {result_of(running.shift, hidden), result_of(running.total(), hidden), product_out};
}

template <class Mode>
Tensor grads_of(const TileKernels<Mode>& kernels, const Tensor& hidden, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& targets, const Tensor& log_norm, const Tensor& coef,
                double logit_scale, double softcap, const Tensor& grad_weight, const std::optional<Tensor>& grad_bias,
                bool weighted, int64_t workspace_mb) {
  using Acc = typename Mode::Acc;
  const Head<Acc> head(hidden, weight, bias, targets, logit_scale, softcap);
  const auto norms = numbers_of<Acc>(log_norm, "log_norm", head.n);
  const auto coefs = numbers_of<Acc>(coef, "coef", head.n);
  std::vector<Acc> minus_coefs(coefs);
  for (Acc& c : minus_coefs) c = -c;
  Acc* grad_w = updated<Acc>(grad_weight, "grad_weight", head.V * head.H);
  Acc* grad_b = updated<Acc>(grad_bias, "grad_bias", head.V);
  Tensor product_out = new_result<Acc>(hidden, {weighted ? head.n : 0, head.H});
  Acc* product = static_cast<Acc*>(product_out.mutable_data_ptr());
  VocabSweep<Mode> sweep(kernels, {head.n, head.H, head.V, true, true}, workspace_mb << 20);
  const RowLaw<Acc> law{head.logit_scale, head.softcap, false};

  for (int64_t row0 = 0; row0 < head.n; row0 += sweep.row_block) {
    const int64_t rows = std::min(sweep.row_block, head.n - row0);
    sweep.take_hidden(head.hidden, row0, rows);
    sweep.take_scaled(head.hidden, row0, rows, minus_coefs.data() + row0);
    Acc* block_product = weighted ? product + row0 * head.H : nullptr;
    for (int64_t v = 0; v < head.V + sweep.span; v += sweep.span) {
      const auto emit = [&](int64_t row, int64_t column, int64_t n, int64_t padded, Acc* x) {
        Acc unused_shift, unused_sum;
        kernels.exp_row(x, n, padded, head.bias_at(v + column), law, norms[row0 + row],
                        head.targets[row0 + row] - v - column, &unused_shift, &unused_sum);
        kernels.store_operands(x, round_up(n, kUnitSize<Mode>), sweep.tile(v, row, column));
      };
      if (!run_tasks(sweep.workers(), sweep.product(head.weight, rows, v - sweep.span, block_product),
                     sweep.gradient(rows, v - sweep.span, coefs.data() + row0, grad_w, grad_b),
                     sweep.logits(head.weight, rows, v, sweep.columns_at(v), emit))) {
        return product_out;
      }
    }
  }
  return product_out;
}

template <class Mode>
std::tuple<Tensor, Tensor> store_of(const TileKernels<Mode>& kernels, const Tensor& hidden, const Tensor& weight,
                                    const std::optional<Tensor>& bias, const Tensor& targets,
                                    const Tensor& target_logits, double logit_scale, double softcap,
                                    const Tensor& tile) {
  using Acc = typename Mode::Acc;
  const Head<Acc> head(hidden, weight, bias, targets, logit_scale, softcap);
  Running<Acc> running(numbers_of<Acc>(target_logits, "target_logits", head.n));
  const Matrix stored = matrix_of(tile, "tile", head.n, head.V);
  STD_TORCH_CHECK(stored.column_stride == 1 || head.V == 1, "tile must have contiguous rows");
  STD_TORCH_CHECK(stored.dtype != Dtype::kFloat16, "tile must not be float16: exp(z - shift) overflows it");
  char* out = static_cast<char*>(tile.mutable_data_ptr());
  const int64_t size = static_cast<int64_t>(tile.element_size());
  VocabSweep<Mode> sweep(kernels, {head.n, head.H, head.V, false, false}, kStoredWorkspace);
  const RowLaw<Acc> law{head.logit_scale, head.softcap, true};

  for (int64_t row0 = 0; row0 < head.n; row0 += sweep.row_block) {
    const int64_t rows = std::min(sweep.row_block, head.n - row0);
    const auto at = [&](int64_t row, int64_t v) { return out + ((row0 + row) * stored.row_stride + v) * size; };
    sweep.take_hidden(head.hidden, row0, rows);
    // One merge for the whole vocabulary, so that no stored piece is rescaled twice.
    running.begin(rows, head.V, sweep.piece_width(rows, head.V));
    const auto emit = [&](int64_t row, int64_t v, int64_t n, int64_t padded, Acc* x) {
      const int64_t piece = row * running.pieces + v / running.width;
      kernels.exp_row(x, n, padded, head.bias_at(v), law, running.shift[row0 + row], head.targets[row0 + row] - v,
                      &running.piece_shift[piece], &running.piece_sum[piece]);
      kernels.store_row(x, n, stored.dtype, at(row, v));
    };
    if (!run_tasks(sweep.workers(), sweep.logits(head.weight, rows, 0, head.V, emit))) break;
    running.merge(sweep.workers(), row0, rows, [&](int64_t row, int64_t v, Acc factor) {
      kernels.scale_row(at(row, v), std::min(running.width, head.V - v), stored.dtype, factor);
    }, [](int64_t, Acc) {});
  }
  return {result_of(running.shift, hidden), result_of(running.total(), hidden)};
}

template <class Mode>
Tensor stored_grads_of(const TileKernels<Mode>& kernels, const Tensor& tile, const Tensor& hidden,
                       const Tensor& weight, const Tensor& coef, const std::optional<Tensor>& grad_weight,
                       const std::optional<Tensor>& grad_bias, bool weighted) {
  using Acc = typename Mode::Acc;
  const int64_t n = hidden.size(0), H = hidden.size(1), V = weight.size(0);
  const Matrix hidden_in = matrix_of(hidden, "hidden", n, H), weight_in = matrix_of(weight, "weight", V, H);
  const Matrix stored = matrix_of(tile, "tile", n, V);
  const auto coefs = numbers_of<Acc>(coef, "coef", n);
  std::vector<Acc> minus_coefs(coefs);
  for (Acc& c : minus_coefs) c = -c;
  Acc* grad_w = updated<Acc>(grad_weight, "grad_weight", V * H);
  Acc* grad_b = updated<Acc>(grad_bias, "grad_bias", V);
  Tensor product_out = new_result<Acc>(hidden, {weighted ? n : 0, H});
  Acc* product = static_cast<Acc*>(product_out.mutable_data_ptr());
  VocabSweep<Mode> sweep(kernels, {n, H, V, true, grad_w != nullptr}, kStoredWorkspace);

  for (int64_t row0 = 0; row0 < n; row0 += sweep.row_block) {
    const int64_t rows = std::min(sweep.row_block, n - row0);
    if (grad_w) sweep.take_scaled(hidden_in, row0, rows, minus_coefs.data() + row0);
    Acc* block_product = weighted ? product + row0 * H : nullptr;
    for (int64_t v = 0; v < V + sweep.span; v += sweep.span) {
      if (!run_tasks(sweep.workers(), sweep.product(weight_in, rows, v - sweep.span, block_product),
                     sweep.gradient(rows, v - sweep.span, coefs.data() + row0, grad_w, grad_b),
                     sweep.load_tile(stored, row0, rows, v))) {
        return product_out;
      }
    }
  }
  return product_out;
}

// Calls f with the kernels for this dtype on this processor.
template <class F>
auto with_kernels(const Tensor& hidden, const Tensor& weight, const F& f) {
  const Isa& isa = current_isa();
  const Dtype dtype = dtype_of(hidden, "hidden");
  STD_TORCH_CHECK(dtype == dtype_of(weight, "weight"), "hidden and weight must have one dtype");
  if (dtype == Dtype::kFloat64) return f(*isa.float64);
  if (dtype == Dtype::kBFloat16 && isa.pairs) return f(*isa.pairs);
  return f(*isa.float32);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softmax_sums(const Tensor& hidden, const Tensor& weight,
                                                const std::optional<Tensor>& bias, const Tensor& targets,
                                                const Tensor& target_logits, double logit_scale, double softcap,
                                                bool weighted, int64_t workspace_mb) {
  return with_kernels(hidden, weight, [&](const auto& kernels) {
    return sums_of(kernels, hidden, weight, bias, targets, target_logits, logit_scale, softcap, weighted,
                   workspace_mb);
  });
}

Tensor softmax_grads(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& targets, const Tensor& log_norm, const Tensor& coef, double logit_scale,
                     double softcap, const Tensor& grad_weight, const std::optional<Tensor>& grad_bias, bool weighted,
                     int64_t workspace_mb) {
  return with_kernels(hidden, weight, [&](const auto& kernels) {
    return grads_of(kernels, hidden, weight, bias, targets, log_norm, coef, logit_scale, softcap, grad_weight,
                    grad_bias, weighted, workspace_mb);
  });
}

std::tuple<Tensor, Tensor> softmax_store(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                                         const Tensor& targets, const Tensor& target_logits, double logit_scale,
                                         double softcap, const Tensor& tile) {
  return with_kernels(hidden, weight, [&](const auto& kernels) {
    return store_of(kernels, hidden, weight, bias, targets, target_logits, logit_scale, softcap, tile);
  });
}

Tensor tile_grads(const Tensor& tile, const Tensor& hidden, const Tensor& weight, const Tensor& coef,
                  const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& grad_bias, bool weighted) {
  return with_kernels(hidden, weight, [&](const auto& kernels) {
    return stored_grads_of(kernels, tile, hidden, weight, coef, grad_weight, grad_bias, weighted);
  });
}

}  // namespace synpo
