// Shared by the drivers of matrix products (matmul.cpp, moe.cpp): what stays between calls, activations as the products
// take them, and the tiles that make the tasks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#include "matmul.h"
#include "threads.h"

namespace harmonium {

constexpr std::int64_t kMaxTileTokens = 22 * kTileTokens;  // of a task: a decoded panel is used for so many

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

// One buffer for what the threads of a call share. It grows and stays; a call holds the lock from take to its end.
struct Arena {
  std::mutex mutex;
  std::uint8_t* data = nullptr;
  std::int64_t size = 0;

  std::uint8_t* take(std::int64_t bytes);
};
Arena& arena();

// Activations as the products take them: a row every row_bytes.
struct Rows {
  const std::uint8_t* data;
  std::int64_t row_bytes;
  Activations kind;
};

// A thread's scratch in these products.
enum Slot { kDecoded = 0, kTile = 1, kOrdered = 7 };

// The tables of the instruction set in use.
const TileTable& tile_table();
const Int8Table& int8_table();
const SplitTable& split_table();

// One row of int8 activations for a split weight: its offset is 120 and the dither of the input.
void quantize_split_row(const float* x, std::int64_t num_inputs, std::uint8_t* row);
// Products of num_panels split panels, from output `first` on, with rows token[0..num_tokens) of x. `decoded`: room
// for two panels.
void split_product(const Weight& weight, std::int64_t first, int num_panels, const Rows& x, const std::int32_t* token,
                   int num_tokens, std::uint8_t* decoded, Next next, float* tile);

// Rows of x in the order of `row` (null: as they come), for products with this weight.
Rows prepare(const Weight& weight, Activations kind, const float* x, const std::int32_t* row, std::int64_t num_rows,
             std::uint8_t* memory);

// Tokens of one expert, at most kMaxTileTokens: rows [begin, begin + count) of the grouped order.
struct Chunk {
  std::int64_t expert;
  std::int64_t begin;
  int count;
};

void add_chunks(std::int64_t expert, std::int64_t begin, std::int64_t end, std::vector<Chunk>& chunks);

// Where the tile of outputs first..first + kTileRows - 1 of one expert lies, as far as it is one piece of memory.
Next place_of_tile(const Weight& weight, std::int64_t expert, std::int64_t first);

// Products of outputs first..first + num_rows - 1 of one expert with the rows token[0..num_tokens) of x. `next`: the
// tile that this thread reads after it, to be fetched meanwhile. Returns the tile, or null when memory is out.
float* product(const Weight& weight, std::int64_t expert, std::int64_t first, int num_rows, const Rows& x,
               const std::int32_t* token, int num_tokens, int thread, Next next);

// Ends of the runs of neighboring tiles that a thread takes at a time.
std::vector<std::int64_t> run_ends(std::int64_t num_tiles, bool is_few);

// Call use(chunk, first output, number of outputs, tile) for every tile of the products of all chunks. A thread takes
// its next run when it begins one, so that it knows what it reads next.
template <typename Use>
void for_each_tile(const Weight& weight, const std::vector<Chunk>& chunks, const Rows& x, const std::int32_t* token,
                   const Use& use) {
  const std::int64_t tiles = ceil_div(weight.num_outputs, kTileRows);
  const bool is_few = !chunks.empty() && chunks.front().count <= kFewTokens;
  const auto ends = run_ends(tiles * static_cast<std::int64_t>(chunks.size()), is_few);
  const auto num_runs = static_cast<std::int64_t>(ends.size());
  const auto begin_of = [&](std::int64_t run) { return run ? ends[run - 1] : 0; };
  const auto next_of = [&](std::int64_t at) {
    return place_of_tile(weight, chunks[at / tiles].expert, at % tiles * kTileRows);
  };
  std::atomic<std::int64_t> taken{0};
  std::atomic<bool> out_of_memory{false};
  parallel(std::min<std::int64_t>(num_threads(), num_runs), [&](std::int64_t, int thread) {
    for (std::int64_t run = taken++, following; run < num_runs; run = following) {
      following = taken++;
      for (std::int64_t at = begin_of(run); at < ends[run]; ++at) {
        const std::int64_t then = at + 1 < ends[run] ? at + 1 : following < num_runs ? begin_of(following) : -1;
        const Next next = then >= 0 ? next_of(then) : Next{nullptr, 0};
        const Chunk& chunk = chunks[at / tiles];
        const std::int64_t first = at % tiles * kTileRows;
        const int num_rows = static_cast<int>(std::min<std::int64_t>(kTileRows, weight.num_outputs - first));
        float* tile = product(weight, chunk.expert, first, num_rows, x, token + chunk.begin, chunk.count, thread, next);
        if (tile)
          use(chunk, first, num_rows, tile);
        else
          out_of_memory = true;
      }
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace harmonium
