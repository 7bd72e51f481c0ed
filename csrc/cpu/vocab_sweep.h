// The tasks that the four ops are made of, over one block of rows and one span of the vocabulary:
//
//   logits      packs some rows of weight and multiplies all hidden rows by them; each piece of a row goes to the op,
//               which turns it into weights exp(z - shift) * d and stores them in the tile
//   product     product += tile @ weight[span]
//   gradient    grad_weight[span] -= tile.T @ (coef * hidden)
//
// There are two tiles, small enough for the caches: the logits of one span and the products of the span before run
// together, so that threads wait for each other once per span. Every task writes its own part of a result and every
// sum has a fixed order, so results do not depend on which thread ran what.
#pragma once

#include <vector>

#include "threads.h"
#include "tile_kernels.h"

namespace synpo {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// A (rows x columns) result cut into tasks of row_block x column_block.
struct Grid {
  int64_t rows, columns, row_block, column_block;

  // Blocks of at most `widest` columns (a multiple of 64); narrower ones, then blocks of rows, until there are three
  // tasks for each worker. Each block of rows packs its columns again, hence no block below 192 rows.
  Grid(int64_t rows, int64_t columns, int64_t widest, int64_t workers) : rows(rows), columns(columns) {
    const int64_t wanted = 3 * workers;
    const int64_t most_row_blocks = std::max<int64_t>(1, rows / 192);
    column_block = widest;
    while (column_block > 64 && divide_up(columns, column_block) * most_row_blocks < wanted) column_block /= 2;
    const int64_t column_blocks = std::max<int64_t>(1, divide_up(columns, column_block));
    row_block = round_up(divide_up(rows, std::clamp<int64_t>(divide_up(wanted, column_blocks), 1, most_row_blocks)), 96);
  }
  int64_t tasks() const { return divide_up(rows, row_block) * std::max<int64_t>(0, divide_up(columns, column_block)); }

  struct Part {
    int64_t row, rows, column, columns;
  };
  Part part(int64_t task) const {
    const int64_t row_blocks = divide_up(rows, row_block);
    const int64_t row = task % row_blocks * row_block, column = task / row_blocks * column_block;
    return {row, std::min(row_block, rows - row), column, std::min(column_block, columns - column)};
  }
};

template <class Mode>
class VocabSweep {
 public:
  using Acc = typename Mode::Acc;
  using Operand = typename Mode::Operand;
  using Unit = typename Mode::Unit;
  static constexpr int64_t kUnit = kUnitSize<Mode>;
  static constexpr int64_t kSegment = 256 * kUnit;            // columns of the tile that lie together
  static constexpr int64_t kTileStride = kSegment + 16 * kUnit;  // off the powers of two that share cache sets
  static constexpr int64_t kRowBlock = 96;

  struct Shape {
    int64_t rows, H, V;
    bool tile, gradient;  // what the op needs: the tile; the panels of coef * hidden
  };

  VocabSweep(const TileKernels<Mode>& kernels, const Shape& shape, int64_t workspace)
      : kernels(kernels), shape_(shape), workers_(thread_count()) {
    const int64_t H = shape.H, size = sizeof(Operand);
    hidden_stride_ = round_up(H, 32) + 32;
    const int64_t row_bytes = (hidden_stride_ + (shape.gradient ? round_up(H, kernels.panel) : 0)) * size;
    const int64_t most_rows = std::clamp<int64_t>(workspace / 4 / row_bytes, kRowBlock, 4096);
    const int64_t blocks = std::max<int64_t>(1, divide_up(shape.rows, most_rows));
    row_block = std::max<int64_t>(1, round_up(divide_up(shape.rows, blocks), 6));

    logit_columns_ = 256;
    while (logit_columns_ > 64 && logit_columns_ * H * size > kPanelBytes) logit_columns_ /= 2;
    int64_t columns = 16384;
    if (shape.tile) {
      // The span's weights are read twice: the second time from the shared cache, when they fit there.
      columns = workers_ * kSpanBytes / (std::max(row_block, H) * size);
      columns = std::max(columns, 2 * workers_ * logit_columns_);
      columns = std::clamp<int64_t>(columns, kSegment, std::max(kSegment, workspace / 4 / (row_block * size)));
    }
    span = std::min(columns / kSegment * kSegment, round_up(shape.V, kSegment));
    product_columns_ = 256;
    while (product_columns_ > 64 && product_columns_ * span * size > kPanelBytes) product_columns_ /= 2;

    hidden_ = Scratch<Operand>(row_block * hidden_stride_);
    tile_size_ = divide_up(span, kSegment) * row_block * kTileStride;
    if (shape.tile) tiles_ = Scratch<Operand>(2 * tile_size_);
    panel_units_ = std::max(logit_columns_ * divide_up(H, kUnit),
                            shape.tile ? product_columns_ * divide_up(span, kUnit) : 0);
    panels_ = Scratch<Unit>(workers_ * panel_units_);
    raw_ = Scratch<Acc>(workers_ * kRowBlock * raw_stride());
    if (shape.gradient) {
      scaled_ = Scratch<Unit>(round_up(H, kernels.panel) * divide_up(row_block, kUnit));
      if (kUnit > 1) transposed_ = Scratch<Unit>(workers_ * kSegment * divide_up(row_block, kUnit));
    }
  }

  const TileKernels<Mode>& kernels;
  int64_t row_block;  // rows that one sweep over the vocabulary takes
  int64_t span;       // columns of the vocabulary between two phases

  int64_t workers() const { return workers_; }

  // The tile of the span at v: its numbers from `column` on, counted from v, up to the end of the segment.
  Operand* tile(int64_t v, int64_t row, int64_t column) const {
    return tiles_.get() + v / span % 2 * tile_size_ + (column / kSegment * row_block + row) * kTileStride +
           column % kSegment;
  }
  // The columns of the span at v; 0 past the ends of the vocabulary.
  int64_t columns_at(int64_t v) const { return v < 0 ? 0 : std::max<int64_t>(0, std::min(span, shape_.V - v)); }

  // Takes rows [row, row + rows) of hidden for the next logits().
  void take_hidden(const Matrix& hidden, int64_t row, int64_t rows) {
    run_tasks(workers_, divide_up(rows, kRowBlock), [&](int64_t task, int64_t) {
      const int64_t first = task * kRowBlock;
      kernels.copy(hidden, row + first, std::min(kRowBlock, rows - first), 0, shape_.H,
                   hidden_.get() + first * hidden_stride_, hidden_stride_);
    });
  }

  // emit(row, column, n, padded, raw): raw[0, n) are the products of hidden row `row` with weight rows v + column on;
  // raw may be overwritten and has room up to `padded`. Pieces of a row come in any order from any thread.
  template <class Emit>
  auto logits(const Matrix& weight, int64_t rows, int64_t v, int64_t columns, const Emit& emit) {
    const Grid grid(rows, columns, logit_columns_, workers_);
    return Tasks{grid.tasks(), [=, &weight, &emit](int64_t task, int64_t worker) {
      const auto part = grid.part(task);
      const int64_t units = divide_up(shape_.H, kUnit), stride = raw_stride();
      Unit* panels = panels_.get() + worker * panel_units_;
      Acc* raw = raw_.get() + worker * kRowBlock * stride;
      const int64_t padded = round_up(part.columns, kernels.panel);
      kernels.pack_transposed(weight, v + part.column, part.columns, shape_.H, panels);
      for (int64_t i = 0; i < part.rows; i += kRowBlock) {
        const int64_t m = std::min(kRowBlock, part.rows - i), row = part.row + i;
        const Unit* a = reinterpret_cast<const Unit*>(hidden_.get() + row * hidden_stride_);
        kernels.multiply(a, hidden_stride_ / kUnit, 1, panels, units * kernels.panel, units, raw, stride, m, padded,
                         true, false);
        for (int64_t t = 0; t < m; ++t) emit(row + t, part.column, part.columns, padded, raw + t * stride);
      }
    }};
  }

  // The width of the pieces that logits() emits; it divides a segment of the tile.
  int64_t piece_width(int64_t rows, int64_t columns) const {
    return Grid(rows, columns, logit_columns_, workers_).column_block;
  }

  // Fills the tile of the span at v from columns of a stored one.
  auto load_tile(const Matrix& stored, int64_t row, int64_t rows, int64_t v) {
    const int64_t columns = columns_at(v), segments = divide_up(columns, kSegment);
    return Tasks{segments * divide_up(rows, kRowBlock), [=, &stored](int64_t task, int64_t) {
      const int64_t column = task % segments * kSegment, first = task / segments * kRowBlock;
      kernels.copy(stored, row + first, std::min(kRowBlock, rows - first), v + column,
                   std::min(kSegment, columns - column), tile(v, first, column), kTileStride);
    }};
  }

  // product[rows, H] = (v > 0 ? product : 0) + tile @ weight rows of the span at v; nothing when product is null.
  auto product(const Matrix& weight, int64_t rows, int64_t v, Acc* product) {
    const int64_t columns = columns_at(v);
    const Grid grid(rows, columns && product ? shape_.H : 0, product_columns_, workers_);
    return Tasks{grid.tasks(), [=, &weight](int64_t task, int64_t worker) {
      const auto part = grid.part(task);
      const int64_t units = divide_up(columns, kUnit);
      Unit* panels = panels_.get() + worker * panel_units_;
      kernels.pack(weight, v, columns, part.column, part.columns, nullptr, panels);
      for (int64_t i = 0; i < part.rows; i += kRowBlock) {
        const int64_t m = std::min(kRowBlock, part.rows - i), row = part.row + i;
        for (int64_t column = 0; column < columns; column += kSegment) {
          kernels.multiply(reinterpret_cast<const Unit*>(tile(v, row, column)), kTileStride / kUnit, 1,
                           panels + column / kUnit * kernels.panel, units * kernels.panel,
                           divide_up(std::min(kSegment, columns - column), kUnit),
                           product + row * shape_.H + part.column, shape_.H, m, part.columns, false,
                           v > 0 || column > 0);
        }
      }
    }};
  }

  // Takes -coef * hidden of rows [row, row + rows) for the next gradient(); minus_coef counts from `row`.
  void take_scaled(const Matrix& hidden, int64_t row, int64_t rows, const Acc* minus_coef) {
    run_tasks(workers_, divide_up(shape_.H, 256), [&](int64_t task, int64_t) {
      const int64_t column = task * 256;
      kernels.pack(hidden, row, rows, column, std::min<int64_t>(256, shape_.H - column), minus_coef,
                   scaled_.get() + column * divide_up(rows, kUnit));
    });
  }

  // For the span at v: grad_weight (V, H) += tile.T @ scaled, grad_bias (V,) -= tile.T @ coef; null ones are left out.
  auto gradient(int64_t rows, int64_t v, const Acc* coef, Acc* grad_weight, Acc* grad_bias) {
    const int64_t columns = columns_at(v);
    const int64_t segments = grad_weight || grad_bias ? divide_up(columns, kSegment) : 0;
    const Grid grid(1, shape_.H, 256, divide_up(workers_, std::max<int64_t>(1, segments)));
    const int64_t parts = std::max<int64_t>(1, grid.tasks());  // without columns of hidden, a bias still has its sum
    return Tasks{segments * parts, [=](int64_t task, int64_t worker) {
      const int64_t column = task / parts * kSegment, n = std::min(kSegment, columns - column);
      const int64_t units = divide_up(rows, kUnit);
      const auto part = grid.part(task % parts);
      const Operand* segment = tile(v, 0, column);
      if (grad_bias && part.column == 0)
        kernels.subtract_column_sums(segment, kTileStride, rows, n, coef, grad_bias + v + column);
      if (!grad_weight) return;
      const Unit* a = reinterpret_cast<const Unit*>(segment);
      int64_t a_unit = kTileStride;
      if (kUnit > 1) {
        Unit* transposed = transposed_.get() + worker * kSegment * divide_up(row_block, kUnit);
        kernels.transpose_units(segment, kTileStride, rows, n, transposed, kSegment);
        a = transposed;
        a_unit = kSegment;
      }
      kernels.multiply(a, 1, a_unit, scaled_.get() + part.column * units, units * kernels.panel, units,
                       grad_weight + (v + column) * shape_.H + part.column, shape_.H, n, part.columns, false, true);
    }};
  }

 private:
  static constexpr int64_t kPanelBytes = 1 << 20;  // a worker's packed columns
  static constexpr int64_t kSpanBytes = 4 << 20;   // one tile, and the span's weights, for each worker

  int64_t raw_stride() const { return logit_columns_ + 16; }

  Shape shape_;
  int64_t workers_, hidden_stride_, logit_columns_, product_columns_, panel_units_, tile_size_;
  Scratch<Operand> hidden_{0}, tiles_{0};
  Scratch<Unit> panels_{0}, scaled_{0}, transposed_{0};
  Scratch<Acc> raw_{0};
};

}  // namespace synpo
