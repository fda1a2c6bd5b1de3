// The drivers: group tokens, cut the work into tasks, call the kernels of the instruction set in use.
#include "tiles.h"

#include <pthread.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace harmonium {

namespace {

constexpr std::int64_t kHugePage = 2 << 20;

// The tables of the instruction set in use.
#if defined(__x86_64__)
template <typename Table>
const Table& choose(const Table& scalar, const Table& avx2, const Table& avx512) {
  if (current_isa() == Isa::avx512) return avx512;
  return current_isa() == Isa::avx2 ? avx2 : scalar;
}
const PackedTable& packed_table() { return choose(kScalarPacked, kAvx2Packed, kAvx512Packed); }
const Bf16Table& bf16_table() { return choose(kScalarBf16, kAvx2Bf16, kAvx512Bf16); }
#else
const PackedTable& packed_table() { return kScalarPacked; }
const Bf16Table& bf16_table() { return kScalarBf16; }
#endif

std::int64_t row_bytes_of(Activations activations, std::int64_t num_inputs) {
  return activations == Activations::int8 ? int8_row_bytes(num_inputs / kBlock) : round_up(num_inputs * 2, 64);
}

// What a weight needs done to int8 activations: its offset, and the half that doubled e2m1 values owe.
void prepare_row(const Weight& weight, Activations kind, const float* x, std::uint8_t* row) {
  const bool is_mxfp4 = weight.kind == Weight::Kind::mxfp4 || weight.kind == Weight::Kind::ggml;
  if (kind == Activations::bf16) {
    const auto round = is_mxfp4 ? bf16_table().round_mxfp4_row : bf16_table().round_row;
    round(x, weight.num_inputs, reinterpret_cast<std::uint16_t*>(row));
  } else if (weight.kind == Weight::Kind::split) {
    quantize_split_row(x, weight.num_inputs, row);
  } else if (is_mxfp4 || weight.kind == Weight::Kind::packed) {
    int8_table().quantize_row(x, weight.num_inputs, kMxfp4Offset, 0.5f, row);
  } else {
    int8_table().quantize_row(x, weight.num_inputs, kInt8Offset, 1.0f, row);
  }
}

std::int64_t decoded_bytes(const Weight& weight, Activations kind) {
  if (kind == Activations::int8) return 2 * panel_bytes(weight.num_inputs / kBlock);
  return weight.num_inputs * kTileRows * 2;
}

// Columns first..first + 31 of a [K, N] weight, missing ones zero.
void copy_columns(const Weight& weight, const std::uint16_t* data, std::int64_t first, int num_rows,
                  std::uint16_t* out) {
  for (std::int64_t k = 0; k < weight.num_inputs; ++k) {
    const std::uint16_t* from = data + k * weight.num_outputs + first;
    std::copy(from, from + num_rows, out + k * kTileRows);
    std::fill(out + k * kTileRows + num_rows, out + (k + 1) * kTileRows, std::uint16_t{0});
  }
}

// The same for a packed tile: as it lies for few tokens, decoded once for many.
float* packed_product(const Weight& weight, std::int64_t expert, std::int64_t first, int num_panels,
                            const Rows& x, const std::int32_t* token, int num_tokens, int thread, Next next,
                            float* tile) {
  const std::int64_t num_blocks = weight.num_inputs / kBlock;
  const std::int64_t at = expert * ceil_div(weight.num_outputs, kTileRows) + first / kTileRows;
  const std::uint8_t* packed = weight.data + at * packed_bytes(num_blocks);
  if (num_tokens < int8_table().panel_tokens) {
    packed_table().product(packed, num_blocks, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  auto* panels = static_cast<std::uint8_t*>(thread_scratch(thread, kDecoded, decoded_bytes(weight, x.kind)));
  if (!panels) return nullptr;
  packed_table().to_panels(packed, num_blocks, panels);
  int8_table().panel_product(panels, num_panels, num_blocks, kMxfp4Offset, x.data, x.row_bytes, token, num_tokens, next,
                             tile);
  return tile;
}

}  // namespace

#if defined(__x86_64__)
const TileTable& tile_table() { return choose(kScalarTile, kAvx2Tile, kAvx512Tile); }
const Int8Table& int8_table() { return choose(kScalarInt8, kAvx2Int8, kAvx512Int8); }
const SplitTable& split_table() { return choose(kScalarSplit, kAvx2Split, kAvx512Split); }
#else
const TileTable& tile_table() { return kScalarTile; }
const Int8Table& int8_table() { return kScalarInt8; }
const SplitTable& split_table() { return kScalarSplit; }
#endif

std::uint8_t* Arena::take(std::int64_t bytes) {
  if (bytes > size) {
    std::free(data);
    data = nullptr;
    size = 0;
    const std::int64_t align = bytes >= kHugePage ? kHugePage : 4096;
    const std::int64_t wanted = round_up(bytes, align);
    data = static_cast<std::uint8_t*>(std::aligned_alloc(align, wanted));
    if (!data) throw std::bad_alloc();
    size = wanted;
#if defined(__linux__)
    if (align == kHugePage) madvise(data, wanted, MADV_HUGEPAGE);
#endif
  }
  return data;
}

Arena& arena() {
  // Never destroyed: threads may outlive static destructors.
  static Arena* a = [] {
    auto* made = new Arena;
    // A child of fork has no other threads: a lock that one of them held would stay locked, so it starts afresh.
    pthread_atfork(nullptr, nullptr, [] { new (&arena()) Arena; });
    return made;
  }();
  return *a;
}

Rows prepare(const Weight& weight, Activations kind, const float* x, const std::int32_t* row, std::int64_t num_rows,
             std::uint8_t* memory) {
  const std::int64_t row_bytes = row_bytes_of(kind, weight.num_inputs);
  constexpr std::int64_t kRowsTogether = 4;  // about 4 microseconds
  parallel(ceil_div(num_rows, kRowsTogether), [&](std::int64_t task, int) {
    for (std::int64_t r = task * kRowsTogether; r < std::min(num_rows, (task + 1) * kRowsTogether); ++r) {
      prepare_row(weight, kind, x + (row ? row[r] : r) * weight.num_inputs, memory + r * row_bytes);
    }
  });
  return {memory, row_bytes, kind};
}

Next place_of_tile(const Weight& weight, std::int64_t expert, std::int64_t first) {
  const std::int64_t num_blocks = weight.num_inputs / kBlock;
  const std::int64_t num_rows = std::min<std::int64_t>(kTileRows, weight.num_outputs - first);
  switch (weight.kind) {
    case Weight::Kind::panels:
      return {weight.data + first / kPanelRows * panel_bytes(num_blocks),
              ceil_div(num_rows, kPanelRows) * panel_bytes(num_blocks)};
    case Weight::Kind::split:
      return {weight.data + first / kPanelRows * split_high_bytes(num_blocks),
              ceil_div(num_rows, kPanelRows) * split_high_bytes(num_blocks)};
    case Weight::Kind::packed: {
      const std::int64_t at = expert * ceil_div(weight.num_outputs, kTileRows) + first / kTileRows;
      return {weight.data + at * packed_bytes(num_blocks), packed_bytes(num_blocks)};
    }
    case Weight::Kind::mxfp4: {
      const std::int64_t rows = weight.place ? weight.place[kPlaceStride * expert]
                                             : expert * weight.num_outputs * num_blocks * 16;
      return {weight.data + rows + first * num_blocks * 16, num_rows * num_blocks * 16};
    }
    default:
      return {nullptr, 0};
  }
}

float* product(const Weight& weight, std::int64_t expert, std::int64_t first, int num_rows, const Rows& x,
               const std::int32_t* token, int num_tokens, int thread, Next next) {
  const Int8Table& int8 = int8_table();
  const Bf16Table& bf16 = bf16_table();
  auto* tile = static_cast<float*>(thread_scratch(thread, kTile, kMaxTileTokens * kTileRows * sizeof(float)));
  if (!tile) return nullptr;
  const std::int64_t num_blocks = weight.num_inputs / kBlock;
  const std::int64_t row = expert * weight.num_outputs + first;
  const int num_panels = static_cast<int>(ceil_div(num_rows, kPanelRows));
  if (weight.kind == Weight::Kind::panels) {
    const std::uint8_t* panels = weight.data + first / kPanelRows * panel_bytes(num_blocks);
    int8.panel_product(panels, num_panels, num_blocks, kInt8Offset, x.data, x.row_bytes, token, num_tokens, next, tile);
    return tile;
  }
  if (weight.kind == Weight::Kind::split) {
    auto* decoded = static_cast<std::uint8_t*>(thread_scratch(thread, kDecoded, decoded_bytes(weight, x.kind)));
    if (!decoded) return nullptr;
    split_product(weight, first, num_panels, x, token, num_tokens, decoded, next, tile);
    return tile;
  }
  if (weight.kind == Weight::Kind::bf16_rows) {
    const auto* rows = reinterpret_cast<const std::uint16_t*>(weight.data) + row * weight.num_inputs;
    bf16.bf16_product(rows, num_rows, weight.num_inputs, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  if (weight.kind == Weight::Kind::packed) {
    return packed_product(weight, expert, first, num_panels, x, token, num_tokens, thread, next, tile);
  }
  const std::uint8_t* blocks = weight.data + row * num_blocks * 16;
  const std::uint8_t* scales = weight.scales + row * num_blocks;
  const std::int64_t* place = weight.place ? weight.place + kPlaceStride * expert : nullptr;
  if (place) {
    blocks = weight.data + place[0] + first * num_blocks * 16;
    scales = weight.data + place[1] + first * num_blocks;
  }
  if (weight.kind == Weight::Kind::ggml) {
    // In order for this tile alone, in memory that stays in the nearest cache: a pass over what is read anyway.
    auto* ordered = static_cast<std::uint8_t*>(thread_scratch(thread, kOrdered, ggml_tile_bytes(num_blocks)));
    if (!ordered) return nullptr;
    blocks = ordered;
    scales = ordered + kTileRows * num_blocks * 16;
    GgmlMatrix matrix = weight.ggml;
    if (place) {
      matrix.first = weight.data + place[0];
      if (matrix.second) matrix.second = weight.data + place[1];
    }
    read_ggml_rows(matrix, place ? first : row, num_rows, num_blocks, ordered, ordered + kTileRows * num_blocks * 16);
  }
  const bool is_mxfp4 = weight.kind == Weight::Kind::mxfp4 || weight.kind == Weight::Kind::ggml;
  if (is_mxfp4 && x.kind == Activations::int8 && num_tokens < int8.panel_tokens) {
    int8.mxfp4_product(blocks, scales, num_rows, num_blocks, x.data, x.row_bytes, token, num_tokens, tile);
    return tile;
  }
  void* decoded = thread_scratch(thread, kDecoded, decoded_bytes(weight, x.kind));
  if (!decoded) return nullptr;
  auto* words = static_cast<std::uint16_t*>(decoded);
  if (weight.kind == Weight::Kind::bf16_columns) {
    const auto* data = reinterpret_cast<const std::uint16_t*>(weight.data);
    copy_columns(weight, data + expert * weight.num_outputs * weight.num_inputs, first, num_rows, words);
    bf16.bf16_column_product(words, weight.num_inputs, x.data, x.row_bytes, token, num_tokens, tile);
  } else if (x.kind == Activations::int8) {
    auto* panels = static_cast<std::uint8_t*>(decoded);
    int8.mxfp4_to_panels(blocks, scales, num_rows, num_blocks, panels);
    int8.panel_product(panels, num_panels, num_blocks, kMxfp4Offset, x.data, x.row_bytes, token, num_tokens, next,
                       tile);
  } else {
    bf16.mxfp4_product(blocks, scales, num_rows, num_blocks, x.data, x.row_bytes, token, num_tokens, words, tile);
  }
  return tile;
}

// Ends of the runs of neighboring tiles that make the tasks: a kernel prefetches the rows that follow, so long runs
// read best. Few tokens are bound by memory: runs shrink towards the end, so that the threads end together. Many are
// bound by arithmetic and by what stays in L2: short runs throughout.
std::vector<std::int64_t> run_ends(std::int64_t num_tiles, bool is_few) {
  constexpr std::int64_t kLongest = 16, kShortest = 1, kManyLongest = 4;
  std::vector<std::int64_t> ends;
  const std::int64_t even = std::clamp<std::int64_t>(num_tiles / (32 * num_threads()), 1, kManyLongest);
  for (std::int64_t done = 0; done < num_tiles;) {
    const std::int64_t left = num_tiles - done;
    const std::int64_t run = is_few ? std::clamp(left / (4 * num_threads()), kShortest, kLongest) : even;
    done += std::min(run, left);
    ends.push_back(done);
  }
  return ends;
}

void add_chunks(std::int64_t expert, std::int64_t begin, std::int64_t end, std::vector<Chunk>& chunks) {
  // Equal shares in whole tiles of the kernel: 140 tokens are 72 and 68, not 132 and 8.
  const std::int64_t parts = ceil_div(end - begin, kMaxTileTokens);
  const std::int64_t share = parts ? round_up(ceil_div(end - begin, parts), kTileTokens) : 0;
  for (std::int64_t at = begin; at < end; at += share) {
    chunks.push_back({expert, at, static_cast<int>(std::min(share, end - at))});
  }
}

void quantize_weight(const std::uint16_t* weight, std::int64_t num_outputs, std::int64_t num_inputs,
                     std::uint8_t* panels) {
  const Int8Table& table = int8_table();
  parallel(ceil_div(num_outputs, kPanelRows), [&](std::int64_t task, int) {
    const std::int64_t first = task * kPanelRows;
    const int num_rows = static_cast<int>(std::min<std::int64_t>(kPanelRows, num_outputs - first));
    table.quantize_panel(weight + first * num_inputs, num_rows, num_inputs, 127.0f,
                         panels + task * panel_bytes(num_inputs / kBlock));
  });
}

void pack_mxfp4(const std::uint8_t* blocks, const std::uint8_t* scales, std::int64_t num_outputs,
                std::int64_t num_blocks, std::uint8_t* packed) {
  for (std::int64_t first = 0; first < num_outputs; first += kTileRows, packed += packed_bytes(num_blocks)) {
    const std::int64_t num_rows = std::min<std::int64_t>(kTileRows, num_outputs - first);
    const std::int64_t last = num_rows < kTileRows ? 0 : num_blocks / 2 * kPairBytes;
    std::fill_n(packed + last, packed_bytes(num_blocks) - last, std::uint8_t{0});
    for (std::int64_t r = 0; r < num_rows; ++r) {
      const std::uint8_t* from = blocks + (first + r) * num_blocks * 16;
      const std::uint8_t* scale = scales + (first + r) * num_blocks;
      const std::int64_t at = r / kPanelRows * (kBlockBytes / 2) + r % kPanelRows * 4;
      BlockPlace place;
      for (std::int64_t b = 0; b < num_blocks; ++b, place.go_on()) {
        packed[place.scales + r] = scale[b];
        for (int part = 0; part < 4; ++part) {
          std::memcpy(packed + place.weights + at + part * 64, from + b * 16 + part * 4, 4);
        }
      }
    }
  }
}

std::int64_t linear_scratch_bytes(std::int64_t num_tokens, std::int64_t num_inputs) {
  return num_tokens *
         std::max(row_bytes_of(Activations::int8, num_inputs), row_bytes_of(Activations::bf16, num_inputs));
}

std::int64_t matmul_thread_bytes(std::int64_t max_inputs) {
  return max_inputs * kTileRows * 2 + kMaxTileTokens * kTileRows * 4;
}

void linear(const float* x, std::int64_t num_tokens, const Weight& weight, Activations activations, bool add,
            float* out) {
  const TileTable& table = tile_table();
  std::lock_guard<std::mutex> lock(arena().mutex);
  std::uint8_t* memory = arena().take(linear_scratch_bytes(num_tokens, weight.num_inputs));
  const Rows rows = prepare(weight, activations, x, nullptr, num_tokens, memory);
  std::vector<std::int32_t> token(num_tokens);
  for (std::int64_t t = 0; t < num_tokens; ++t) token[t] = static_cast<std::int32_t>(t);
  std::vector<Chunk> chunks;
  add_chunks(0, 0, num_tokens, chunks);
  const auto use = [&](const Chunk& chunk, std::int64_t first, int num_rows, const float* tile) {
    const std::uint16_t* bias = weight.bias ? weight.bias + first : nullptr;
    for (int i = 0; i < chunk.count; ++i) {
      float* to = out + (chunk.begin + i) * weight.num_outputs + first;
      table.finish(tile + i * kTileRows, bias, num_rows, 1.0f, add, to);
    }
  };
  for_each_tile(weight, chunks, rows, token.data(), use);
}

double measure_read_bandwidth(const std::uint8_t* data, std::int64_t size_bytes, int repeats) {
  const TileTable& table = tile_table();
  const std::int64_t piece = 256 << 10;
  std::atomic<std::uint64_t> keep{0};
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    parallel(size_bytes / piece, [&](std::int64_t task, int) { keep += table.read_all(data + task * piece, piece); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, static_cast<double>(size_bytes / piece * piece) / seconds.count());
  }
  return best;
}

namespace {

double measure_spin(double (*spin)(std::int64_t), std::int64_t rounds) {
  std::atomic<std::int64_t> done{0};
  const auto begin = std::chrono::steady_clock::now();
  parallel(64 * num_threads(), [&](std::int64_t, int) { done += static_cast<std::int64_t>(spin(rounds)); });
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(done) / seconds.count();
}

}  // namespace

double measure_int8_ops(std::int64_t rounds) { return measure_spin(tile_table().spin_int8, rounds); }
double measure_bf16_ops(std::int64_t rounds) { return measure_spin(tile_table().spin_bf16, rounds); }

}  // namespace harmonium
