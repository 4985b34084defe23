// What a decode step reads besides weights and pages, from what lies on the device: embeddings of the requests' last
// tokens, positions, lengths, slots and block tables.
//
// Tile: a row is `words` times 16 bytes of its embedding, then the entries of its tables, group after group; a block
// copies 1024 of these items, a thread 4. The first block of a row adds its position, its length and its slots.
// Bytes: the embedding's and the tables', read and written once.
// Waiting: for the kernel ahead, which may be the one that chose the tokens.
#include "common/dependent_launch.cuh"

using i64 = long long;

constexpr int kThreads = 256;  // the launcher's THREADS
constexpr int kItems = 4;      // of a thread, all in flight

extern "C" __global__ void __launch_bounds__(kThreads) smxx_decode_inputs(
    const i64* token, const int* position,  // [requests or more]
    const i64* source,                      // [rows], a row's request
    const i64* padding,                     // [rows], added to a row's slots
    const int* tables,                      // [groups, requests, columns], -1: no page
    const uint4* embeddings,                // [vocab, words], rows stride words apart
    uint4* hidden,                          // [rows, words]
    int* positions, int* lengths,           // [rows]
    i64* slots,                             // [groups, rows]
    int* row_tables,                        // [groups, rows, columns]
    i64 stride, int words, int groups, int requests, int columns, int page_size) {
  const int row = blockIdx.x, rows = gridDim.x, items = words + groups * columns;
  wait_for_previous_kernel();
  let_next_kernel_start();

  const i64 request = source[row];
  const uint4* const embedding = embeddings + token[request] * stride;
  uint4 word[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = (blockIdx.y * kItems + i) * kThreads + threadIdx.x;
    if (item < words) {
      word[i] = embedding[item];
    } else if (item < items) {
      const int entry = item - words, group = entry / columns;
      word[i].x = tables[(static_cast<i64>(group) * requests + request) * columns + entry - group * columns];
    }
  }
  if (blockIdx.y == 0) {
    const int at = position[request], column = at / page_size;
    for (int group = threadIdx.x; group < groups; group += kThreads) {
      const i64 table = (static_cast<i64>(group) * requests + request) * columns;
      const i64 page = column < columns ? tables[table + column] : -1;
      slots[static_cast<i64>(group) * rows + row] = page * page_size + at % page_size + padding[row];
    }
    if (threadIdx.x == 0) positions[row] = at, lengths[row] = at + 1;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int item = (blockIdx.y * kItems + i) * kThreads + threadIdx.x;
    if (item < words) {
      hidden[static_cast<i64>(row) * words + item] = word[i];
    } else if (item < items) {
      const int entry = item - words, group = entry / columns;
      row_tables[(static_cast<i64>(group) * rows + row) * columns + entry - group * columns] = word[i].x;
    }
  }
}
