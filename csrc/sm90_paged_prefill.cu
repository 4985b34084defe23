// Attention of many new tokens a request over a paged cache: e4m3 pages at the speed and accuracy of 16-bit math.
//
// A block takes 128 rows at a time, a row being a (token, query head) of one kv head: a group's heads share every
// key, and rows follow each other across tokens, so no row is padding for any group. Two warpgroups of 64 rows each
// hold q, the running sums and the probabilities in registers; keys and values are B, in shared memory:
//
//   S = q K^T   A = q, registers; B = keys [keys][128 of d], K-major
//   O = P V     A = P, registers; B = values [keys][128 of d], MN-major: as they lie
//
// Everything is f16 with an e4m3 cache: keys and values convert exactly, q = 2^e * f16 a row loses nothing that could
// be seen (bf16 has 8 significant bits, f16 11, and only what is below 2^-31 of a row's largest vanishes),
// probabilities have three bits more than in bf16. A bf16 cache is multiplied as it is, with q and P in bf16.
//
//   producer warpgroup   copy engine -> staging (e4m3, 3 tiles) -> f16 with the matrix unit's swizzle (2 tiles)
//   consumer warpgroups  S of the next tile and O of this one in one go, then softmax while the other one's go runs
//
// An expanded tile serves 128 rows x 2 products. Shared memory is what limits: 128 keys are 2048 clocks of matrix unit,
// which reads 128 KB meanwhile; copies write 32, the expansion reads 32 and writes 64: 2000 clocks at 128 bytes each.
// q in registers saves the 32 KB that would not fit.
//
// Rows wait in a line of items (request, then its tiles of 128 rows from the last, which has most keys, then kv heads);
// blocks take them in order, so heads that run together read keys that L2 has. Keys are visited from the last.
#include "common/warp.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kDim = 128;
constexpr int kRows = 128;  // of an item
constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kMostRequests = 256;
constexpr int kItems = 8;          // announced at a time: more than the rings' tiles
constexpr float kLowest = -1e30f;  // of maxima: nothing is infinite
constexpr float kLift = 8.0f;      // probabilities are kept times 2^8, up to 2^15: f16 ends at 65504
constexpr float kMostRise = 7.0f;  // of a maximum, log2, before sums are scaled anew
#ifndef CONVERT
#define CONVERT 1
#endif
constexpr bool kConvert = CONVERT;  // e4m3 -> f16 by the conversion instruction, else by shifts, in f16 times 2^-8

template <int kKeys_, bool kBf16_>
struct Shape {
  static constexpr bool kBf16 = kBf16_;  // the cache's type, else e4m3
  static constexpr int kKeys = kKeys_;   // of a tile
  static constexpr int kBytes = kKeys * kDim * 2;  // of a tile's keys or values as operands
  static constexpr int kStaged = kKeys * kDim;     // as e4m3
  static constexpr int kLanding = 3;               // tiles that copies are under way for
  static constexpr int kReady = kBf16 ? 3 : 2;     // tiles of operands; bf16: the same ones
  static constexpr int kLead = kBf16 ? 2 : 3;      // tiles asked for before the one that is made ready
  static constexpr int kStaging = kReady * 2 * kBytes;
  static constexpr int kAnnounced = kStaging + (kBf16 ? 0 : kLanding * 2 * kStaged);  // [kItems] Item
  static constexpr int kBarriers = kAnnounced + kItems * 64;
  static constexpr int kScan = kBarriers + (3 * kLanding + 4 * kReady + kItems) * 8;  // [12 warps]
  static constexpr int kFirsts = kScan + 64;                                          // [requests + 2] first items
  static constexpr int kEnd = kFirsts + (kMostRequests + 2) * 4;
  static_assert(kEnd + 1024 <= 227 * 1024);
};

struct alignas(64) TensorMap {
  char bytes[128];
};
struct Maps {
  TensorMap k, v;  // [pages, kv heads, page size, 128] in boxes of a few positions x 128 bytes; bf16: swizzled by these
};

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- barriers and copies ----

__device__ inline void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline bool barrier_passed(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ inline void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void announce(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void show_to_matrix_unit() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void copy_box(u32 to, const TensorMap* map, int d, int position, int head, int page, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(d), "r"(position), "r"(head), "r"(page), "r"(barrier)
      : "memory");
}
__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ inline void prefetch_line(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

// A wait of seconds is a fault: an error is worth more than a process that hangs. (With a trap ptxas would not use the
// registers that setmaxnreg brings.)
constexpr int kMostTries = 1 << 24;
__device__ inline void fail() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
  for (int tries = 0; !barrier_passed(barrier, parity); ++tries)
    if (tries > kMostTries) fail();
}

// ---- shared memory ----

__device__ inline void store_shared(u32 at, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ inline uint4 load_shared_4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
// ---- arithmetic ----

__device__ inline float exp2_of(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline u32 pair_bf16(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ inline u32 pair_f16(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Halves by mov: the conversion takes either half of a register as it is.
__device__ inline void convert(u32 w, u32& first, u32& second) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(first), "=r"(second)
      : "r"(w));
}
__device__ inline float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Four e4m3 as two pairs: bytes (0, 1) and (2, 3); by shifts (0, 2) and (1, 3). An e4m3's bits, put where f16 has its
// sign, the lower four of its exponent and the upper three of its mantissa, are its value * 2^-8, subnormals too.
__device__ inline void expand(u32 w, u32& first, u32& second) {
  if constexpr (kConvert) {
    convert(w, first, second);
  } else {
    constexpr u32 kValue = 0x3f803f80u, kSign = 0x80008000u;
    first = ((w << 7) & kValue) | ((w << 8) & kSign);
    second = ((w >> 1) & kValue) | (w & kSign);
  }
}
// Whether any of 16 bytes is an e4m3 NaN, which shifts would take for 480.
__device__ inline bool has_nan(uint4 w) {
  constexpr u32 kAll = 0x7f7f7f7fu, kOnes = 0x01010101u;
  return (((w.x & kAll) + kOnes) | ((w.y & kAll) + kOnes) | ((w.z & kAll) + kOnes) | ((w.w & kAll) + kOnes)) & ~kAll;
}
__device__ inline u32 nan_where(u32 pair) {  // f16 of 480 * 2^-8 to NaN
  return ((pair & 0x7fff) == 0x3f80 ? 0x7fffu : pair & 0xffff) |
         ((pair & 0x7fff0000) == 0x3f800000 ? 0x7fff0000u : pair & 0xffff0000);
}

// Four words in each of four neighbouring lanes: lane t's word i becomes lane i's word t.
__device__ inline void transpose(u32 (&w)[4], int t) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const u32 got = __shfl_xor_sync(kAllLanes, t & step ? w[low] : w[high], step);
      w[low] = t & step ? got : w[low];
      w[high] = t & step ? w[high] : got;
    }
  }
}
// 16 bytes of a row as words of pairs in the order of the operands, and back.
__device__ inline void to_operand_order(u32 (&w)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 first = __byte_perm(w[i], w[i + 1], 0x5410), second = __byte_perm(w[i], w[i + 1], 0x7632);
    w[i] = first;
    w[i + 1] = second;
  }
}

// ---- wgmma: sums (+)= A B, A of 64 x 16 in registers, B of 16 x n in shared memory, swizzled by 128 bytes ----

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending, int kSums>
__device__ inline void wgmma_wait(float (&d)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Operands of matrix instructions under way must stay where they are until these have been waited for.
template <int kWords>
__device__ inline void hold(const u32 (&a)[kWords]) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) asm volatile("" ::"r"(a[i]) : "memory");
}

// Values must have been computed where this stands: the compiler would put that off behind the wait that follows.
template <int kValues>
__device__ inline void settle(float (&x)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Rows (of keys) of 128 bytes, 1024 bytes from 8 rows to the next; the other 64 of d lie `kApart` bytes on.
template <int kApart>
__device__ inline u64 descriptor(u32 address) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "r"(address >> 4 | (kApart >> 4) << 16), "n"(1024 >> 4 | 1 << 30));
  return r;
}
__device__ inline u32 uniform(u32 x) { return __shfl_sync(kAllLanes, x, 0); }

#define D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define D3 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D4 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define WGMMA(n, types, transposed, list, a0, a1, a2, a3, b, add, ...)                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n                \
               "k16.f32." types " {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, " transposed \
               "; }"                                                                                               \
               : __VA_ARGS__                                                                                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"(kAdd))

#define WGMMA_128(types, transposed)                                                                               \
  WGMMA(128, types, transposed, D0 D1 D2 D3 D4, 64, 65, 66, 67, 68, 69, R16(0), R16(16), R16(32), R16(48))
#define WGMMA_112(types, transposed)                                                                               \
  WGMMA(112, types, transposed, D0 D1 D2 D3, 56, 57, 58, 59, 60, 61, R16(0), R16(16), R16(32), R8(48))

// Scores: columns are keys, K-major.
template <bool kBf16, bool kAdd>
__device__ inline void multiply_keys(float (&d)[64], const u32* a, u64 columns) {
  if constexpr (kBf16) WGMMA_128("bf16.bf16", "0");
  else WGMMA_128("f16.f16", "0");
}
template <bool kBf16, bool kAdd>
__device__ inline void multiply_keys(float (&d)[56], const u32* a, u64 columns) {
  if constexpr (kBf16) WGMMA_112("bf16.bf16", "0");
  else WGMMA_112("f16.f16", "0");
}
// Outputs: columns are d, k is keys.
template <bool kBf16>
__device__ inline void multiply_values(float (&d)[64], const u32* a, u64 columns) {
  constexpr bool kAdd = true;
  if constexpr (kBf16) WGMMA_128("bf16.bf16", "1");
  else WGMMA_128("f16.f16", "1");
}

// ---- the work ----

struct Attention {
  const u16* q;          // bf16, rows of 128 that begin at multiples of 16 bytes
  const float *k_scale, *v_scale;
  const int* table;      // [requests, pages]
  const int* lengths;    // [requests]
  const int* starts;     // [requests + 1]
  const u16* gate;       // bf16 or null
  u16* out;              // bf16 [tokens, kv_heads * group, 128]
  float* lse;            // [tokens, kv_heads * group] or null
  int* counter;          // items taken beyond each block's first; 0 before and after
  i64 q_token, q_head, table_request, gate_token, gate_head;
  int k_scale_head, v_scale_head;
  int requests, tokens;  // tokens past starts[requests] get zeros; -1 leaves them alone
  int kv_heads, group, page_shift, box_shift, window;
  float score_scale;     // softmax_scale * log2(e)
};

struct alignas(16) Item {
  int tiles, base;          // tiles of keys begin at base; none: there are no more items
  int key_first, key_stop;  // keys that any of the item's rows sees
  int low, high;            // positions of the item's first and last token
  int first, rows;          // its rows of the request's; how many the request has
  int token, position;      // the request's first new token: its row of q, its position
  int request, head;
};

struct Request {
  int length, token, tokens;  // with the new ones; first row of q; how many new ones
};
// One more than there are has the rows past the last one's, and no keys.
__device__ inline Request request_at(const Attention& a, int i) {
  Request r{0, 0, 0};
  if (i > a.requests || (i == a.requests && a.tokens < 0)) return r;
  r.token = __ldg(a.starts + i);
  r.tokens = (i < a.requests ? __ldg(a.starts + i + 1) : a.tokens) - r.token;
  if (i < a.requests) r.length = __ldg(a.lengths + i);
  return r;
}

// firsts: of requests, their first item; `request` is at most the item's and becomes it.
template <class S>
__device__ inline Item item_at(const Attention& a, const int* firsts, int& request, int number) {
  while (number >= firsts[request + 1]) ++request;
  const Request r = request_at(a, request);
  Item item;
  const int index = number - firsts[request], from_last = index / a.kv_heads;
  item.request = request;
  item.head = index - from_last * a.kv_heads;
  item.rows = r.tokens * a.group;
  item.first = ((item.rows + kRows - 1) / kRows - 1 - from_last) * kRows;
  item.token = r.token;
  item.position = r.length - r.tokens;
  item.low = item.position + item.first / a.group;
  item.high = item.position + min((item.first + kRows - 1) / a.group, r.tokens - 1);
  item.key_first = max(0, item.low - a.window + 1);
  item.key_stop = max(0, item.high + 1);
  item.base = item.key_first & -(1 << a.box_shift);
  // Without keys one tile is all hidden: zeros come out.
  item.tiles = max(1, (item.key_stop - item.base + S::kKeys - 1) / S::kKeys);
  return item;
}

template <int kRing>
__device__ inline void advance(int& slot, u32& parity) {
  if (++slot == kRing) {
    slot = 0;
    parity ^= 1;
  }
}

template <class S>
struct Barriers {
  u32 base;
  __device__ u32 landed_keys(int slot) const { return base + slot * 8; }
  __device__ u32 landed_values(int slot) const { return base + (S::kLanding + slot) * 8; }
  __device__ u32 taken(int slot) const { return base + (2 * S::kLanding + slot) * 8; }
  // bf16 keys are ready when they have landed. (A warp that stood between would wait for values that wait for keys.)
  __device__ u32 full_keys(int slot) const {
    return S::kBf16 ? landed_keys(slot) : base + (3 * S::kLanding + slot) * 8;
  }
  __device__ u32 full_values(int slot) const { return base + (3 * S::kLanding + S::kReady + slot) * 8; }
  __device__ u32 empty_keys(int slot) const { return base + (3 * S::kLanding + 2 * S::kReady + slot) * 8; }
  __device__ u32 empty_values(int slot) const { return base + (3 * S::kLanding + 3 * S::kReady + slot) * 8; }
  __device__ u32 item(int slot) const { return base + (3 * S::kLanding + 4 * S::kReady + slot) * 8; }
};

// The item after those that a warp has had.
template <class S>
struct Announced {
  int slot = 0;
  u32 parity = 0;
  __device__ inline Item next(u32 shared, const Barriers<S>& barriers) {
    barrier_wait(barriers.item(slot), parity);
    advance<kItems>(slot, parity);
    return last(shared);
  }
  // The same again: registers need not keep it. Its place is not used anew before its tiles are.
  __device__ inline Item last(u32 shared) const {
    const u32 from = shared + S::kAnnounced + (slot + kItems - 1) % kItems * 64;
    const uint4 x = load_shared_4(from), y = load_shared_4(from + 16), z = load_shared_4(from + 32);
    Item item;
    item.tiles = __shfl_sync(kAllLanes, static_cast<int>(x.x), 0);  // ptxas shall see that loops are uniform
    item.base = x.y, item.key_first = x.z, item.key_stop = x.w;
    item.low = y.x, item.high = y.y, item.first = y.z, item.rows = y.w;
    item.token = z.x, item.position = z.y, item.request = z.z, item.head = z.w;
    return item;
  }
};
template <class S>
__device__ inline void announce_item(const Item& item, int slot, u32 shared, const Barriers<S>& barriers) {
  const u32 to = shared + S::kAnnounced + slot * 64;
  store_shared(to, make_uint4(item.tiles, item.base, item.key_first, item.key_stop));
  store_shared(to + 16, make_uint4(item.low, item.high, item.first, item.rows));
  store_shared(to + 32, make_uint4(item.token, item.position, item.request, item.head));
  barrier_arrive(barriers.item(slot));
}

// ---- one warp asks for tiles ----

template <class S>
struct Copies {
  const Attention& a;
  const Maps& maps;
  const int* firsts;
  const Barriers<S> barriers;
  const u32 shared;
  const int all_items;
  int request = 0, number, after = 0;  // after: lane 0's, how many items beyond the first ones were taken before it
  int tile = -1, page = 0, item_slot = 0, slot = 0;
  u32 parity = 1;
  bool is_done = false;
  Item item{};

  __device__ inline int key_of(int lane) const { return item.base + tile * S::kKeys + (lane << a.box_shift); }
  __device__ inline bool is_needed(int lane) const {
    const int key = key_of(lane), box = 1 << a.box_shift;
    return lane << a.box_shift < S::kKeys && key < item.key_stop && key + box > item.key_first;
  }
  // Each lane has a piece of the tile and finds its page, one tile ahead.
  __device__ inline void look_up(int lane) {
    if (tile >= 0 && is_needed(lane))
      page = __ldg(a.table + item.request * a.table_request + (key_of(lane) >> a.page_shift));
  }
  __device__ inline void begin_item(int lane) {
    is_done = number >= all_items;
    item.tiles = 0;
    if (!is_done) item = item_at<S>(a, firsts, request, number);
    if (lane == 0) announce_item<S>(item, item_slot, shared, barriers);
    if (++item_slot == kItems) item_slot = 0;
    if (is_done) return;
    if (lane == 0) after = atomicAdd(a.counter, 1);
    tile = item.tiles - 1;
    look_up(lane);
#pragma unroll
    for (int i = 0; i < kRows; i += 32) {
      const int row = min(item.first + i + lane, item.rows - 1), token = row / a.group;
      const u16* q = a.q + (item.token + token) * a.q_token + (item.head * a.group + row - token * a.group) * a.q_head;
      prefetch_line(q);
      prefetch_line(q + 64);
    }
  }
  __device__ inline void next(int lane) {
    if (is_done) return;
    if (tile < 0) {
      if (lane == 0 && after == all_items - 1) *a.counter = 0;  // nobody takes another
      number = __shfl_sync(kAllLanes, after, 0) + static_cast<int>(gridDim.x);
      begin_item(lane);
      if (is_done) return;
    }
    if constexpr (S::kBf16) {
      barrier_wait(barriers.empty_keys(slot), parity);
      barrier_wait(barriers.empty_values(slot), parity);
    } else {
      barrier_wait(barriers.taken(slot), parity);
    }
    const bool needed = is_needed(lane);
    const int bytes = __popc(__ballot_sync(kAllLanes, needed)) * (kDim * (S::kBf16 ? 2 : 1) << a.box_shift);
    if (lane == 0) {
      barrier_expect(barriers.landed_keys(slot), bytes);
      barrier_expect(barriers.landed_values(slot), bytes);
    }
    __syncwarp();
    if (needed) {
      const int position = key_of(lane) & ((1 << a.page_shift) - 1);
      constexpr int kTile = S::kBf16 ? S::kBytes : S::kStaged;
      const u32 to = shared + (S::kBf16 ? 0 : S::kStaging) + slot * 2 * kTile + (lane << a.box_shift) * 128;
#pragma unroll
      for (int half = 0; half < (S::kBf16 ? 2 : 1); ++half)
        copy_box(to + half * S::kKeys * 128, &maps.k, half * 64, position, item.head, page, barriers.landed_keys(slot));
#pragma unroll
      for (int half = 0; half < (S::kBf16 ? 2 : 1); ++half)
        copy_box(to + kTile + half * S::kKeys * 128, &maps.v, half * 64, position, item.head, page,
                 barriers.landed_values(slot));
    }
    advance<S::kLanding>(slot, parity);
    --tile;
    look_up(lane);
  }
};

// ---- four warps make operands of what has landed ----

// e4m3 to f16: eight lanes take a row, 16 bytes each. Of d = 16 c + 8 h + j, half h of the operand has j of lane c:
// stores of a row go to all banks. Rows outside [low, high) become zeros: a probability of zero does not undo a NaN.
template <class S, bool kValues>
__device__ inline void expand_tile(u32 from, u32 to, int thread, int low, int high) {
  constexpr int kTurns = S::kKeys / 16, kAtOnce = 4;
  const int row = thread / 8, lane = thread % 8;
  from += row * 128 + lane * 16;
  to += row * 128 + ((lane ^ (row & 7)) << 4);
  const bool has_hidden = kValues && (low > 0 || high < S::kKeys);
#pragma unroll
  for (int first = 0; first < kTurns; first += kAtOnce) {
    uint4 bytes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < kTurns) bytes[i] = load_shared_4(from + (first + i) * 16 * 128);
    if (has_hidden) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = row + (first + i) * 16;
        if (at < low || at >= high) bytes[i] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= kTurns) break;
      uint4 even, odd;
      expand(bytes[i].x, even.x, even.y);
      expand(bytes[i].y, even.z, even.w);
      expand(bytes[i].z, odd.x, odd.y);
      expand(bytes[i].w, odd.z, odd.w);
      if (!kConvert && has_nan(bytes[i])) {
        even = make_uint4(nan_where(even.x), nan_where(even.y), nan_where(even.z), nan_where(even.w));
        odd = make_uint4(nan_where(odd.x), nan_where(odd.y), nan_where(odd.z), nan_where(odd.w));
      }
      store_shared(to + (first + i) * 16 * 128, even);
      store_shared(to + (first + i) * 16 * 128 + S::kKeys * 128, odd);
    }
  }
}

template <class S>
__device__ inline void produce(const Attention& a, const Maps& maps, u32 shared, const int* firsts, int all_items,
                               const Barriers<S>& barriers) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int warp = __shfl_sync(kAllLanes, thread / 32, 0);
  Copies<S> copies{a, maps, firsts, barriers, shared, all_items};
  copies.number = blockIdx.x;
  if (warp == 0) {
    copies.begin_item(lane);
    for (int i = 0; i < S::kLead; ++i) copies.next(lane);
  }
  Announced<S> announced;
  int landing = 0, ready = 0;
  u32 landing_parity = 0, ready_parity = 1;
  for (Item item; (item = announced.next(shared, barriers)).tiles > 0;) {
    for (int tile = item.tiles - 1; tile >= 0; --tile) {
      const int key0 = item.base + tile * S::kKeys, low = item.key_first - key0, high = item.key_stop - key0;
      const u32 keys = shared + ready * 2 * S::kBytes, values = keys + S::kBytes;
      if constexpr (!S::kBf16) {
        barrier_wait(barriers.landed_keys(landing), landing_parity);
        const u32 staged = shared + S::kStaging + landing * 2 * S::kStaged;
        barrier_wait(barriers.empty_keys(ready), ready_parity);
        expand_tile<S, false>(staged, keys, thread, 0, S::kKeys);
        show_to_matrix_unit();
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.full_keys(ready));
        barrier_wait(barriers.landed_values(landing), landing_parity);
        barrier_wait(barriers.empty_values(ready), ready_parity);
        expand_tile<S, true>(staged + S::kStaged, values, thread, low, high);
        show_to_matrix_unit();
        __syncwarp();
        if (lane == 0) {
          barrier_arrive(barriers.taken(landing));
          barrier_arrive(barriers.full_values(ready));
        }
      } else {
        barrier_wait(barriers.landed_values(landing), landing_parity);
        if ((low > 0 || high < S::kKeys) && thread < S::kKeys && (thread < low || thread >= high)) {
#pragma unroll
          for (int i = 0; i < 16; ++i)
            store_shared(values + i / 8 * S::kKeys * 128 + thread * 128 + i % 8 * 16, make_uint4(0, 0, 0, 0));
          show_to_matrix_unit();
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.full_values(ready));
      }
      advance<S::kLanding>(landing, landing_parity);
      advance<S::kReady>(ready, ready_parity);
      if (warp == 0) copies.next(lane);
    }
  }
}

// ---- two warpgroups: products and softmax of 64 rows each ----

// A thread's two rows, r and r + 8 of the warp's 16.
struct Rows {
  int position[2];
  float factor[2];  // of scores, to log2
};

// 16 bytes of a row that lane t of four moves: the i-th of them, in the order of the operands' 64 of d twice.
template <class S>
__device__ inline int unit_of(int i, int t) {
  return S::kBf16 ? 8 * (t & 1) + 2 * i + (t >> 1) : 4 * i + t;
}

template <class S>
__device__ inline void load_queries(const Attention& a, const Item& item, int row, int t, Rows& rows, u32 (&q)[8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = item.first + row + 8 * r, valid = min(at, item.rows - 1), token = valid / a.group;
    const int head = item.head * a.group + valid - token * a.group;
    rows.position[r] = item.position + token;
    const uint4* from = reinterpret_cast<const uint4*>(a.q + (item.token + token) * a.q_token + head * a.q_head);
    uint4 raw[4];
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = __ldg(from + unit_of<S>(i, t));
    float factor = a.score_scale, up = 1.0f;
    if constexpr (!S::kBf16) {
      factor *= __ldg(a.k_scale + item.head * a.k_scale_head) * (kConvert ? 1.0f : 256.0f);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) largest = max(largest, max(words[j] & 0x7FFF, words[j] >> 16 & 0x7FFF));
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      const u32 e = max(largest >> 7, 15u);
      up = __uint_as_float((268 - e) << 23);  // 2^(141 - e): the largest value lands in [2^14, 2^15)
      factor *= __uint_as_float((e - 14) << 23);
      if (e == 255) up = __uint_as_float(0x7FC00000);  // infinity or NaN somewhere: the row's whole result is NaN
    }
    const bool is_negative = factor < 0.0f;  // the maximum is taken before the factor
    if (is_negative) up = -up;
    rows.factor[r] = fmaxf(fabsf(factor), 0x1p-100f);  // hidden keys' -infinity times zero would be NaN
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 w[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
      if constexpr (S::kBf16) {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] ^= is_negative ? 0x80008000u : 0;
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = pair_f16(low_bf16(w[j]) * up, high_bf16(w[j]) * up);
        if constexpr (!kConvert) to_operand_order(w);
      }
      transpose(w, t);
      q[i][r] = w[0];
      q[4 + i][r] = w[1];
      q[i][2 + r] = w[2];
      q[4 + i][2 + r] = w[3];
    }
  }
}

template <class S>
__device__ inline void write_outputs(const Attention& a, const Item& item, const Rows& rows, int row, int t,
                                     const float (&out)[64], const float (&highest)[2], const float (&total)[2]) {
  float v_scale = 1.0f;
  if constexpr (!S::kBf16) v_scale = __ldg(a.v_scale + item.head * a.v_scale_head) * (kConvert ? 1.0f : 256.0f);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r], scale = v_scale;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const int at = item.first + row + 8 * r, in_request = rows.position[r] - item.position;
    const int token = item.token + in_request, head = item.head * a.group + at - in_request * a.group;
    const i64 query = static_cast<i64>(token) * a.kv_heads * a.group + head;
    const bool is_row = at < item.rows;
    if (a.gate != nullptr && is_row) {
      const u32 gate = __ldg(a.gate + token * a.gate_token + head * a.gate_head);
      scale = __fdividef(scale, 1.0f + __expf(-__uint_as_float(gate << 16)));
    }
    scale = sum == 0.0f ? 0.0f : scale / sum;
    const float shift = highest[r] == kLowest ? 0.0f : highest[r] * rows.factor[r];
    if (a.lse != nullptr && t == 0 && is_row) a.lse[query] = (shift + log2f(sum) - kLift) * 0.69314718f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // columns of 8: 64 of d, then the other 64
        const float* v = out + 4 * (8 * (j & 1) + 2 * i + (j >> 1)) + 2 * r;
        w[j] = pair_bf16(v[0] * scale, v[1] * scale);
      }
      transpose(w, t);
      if constexpr (!S::kBf16 && !kConvert) to_operand_order(w);
      if (is_row)
        *(reinterpret_cast<uint4*>(a.out + query * kDim) + unit_of<S>(i, t)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

template <class S>
__device__ inline void hide(float (&s)[S::kKeys / 2], const Rows& rows, int key0, int window) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int behind = rows.position[r] - key0;
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float& x = s[4 * j + 2 * r + b];
        if (static_cast<u32>(behind - 8 * j - b) >= static_cast<u32>(window)) x = -__int_as_float(0x7F800000);
      }
    }
  }
}

// Scores to probabilities * 2^kLift, relative to maxima that rise only when they must. Returns whether they rose: sums
// so far are then to be multiplied by `before`.
template <class S>
__device__ inline bool soften(float (&s)[S::kKeys / 2], const Rows& rows, float (&highest)[2], float (&total)[2],
                              float (&before)[2]) {
  float top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < S::kKeys / 8; ++j) top[r] = fmaxf(top[r], fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], step));
    top[r] = fmaxf(top[r], highest[r]);
  }
  const bool rises = __any_sync(kAllLanes, (top[0] - highest[0]) * rows.factor[0] > kMostRise ||
                                               (top[1] - highest[1]) * rows.factor[1] > kMostRise);
  if (rises) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      before[r] = exp2_of((highest[r] - top[r]) * rows.factor[r]);
      highest[r] = top[r];
      total[r] *= before[r];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float minus = kLift - (highest[r] == kLowest ? 0.0f : highest[r] * rows.factor[r]);
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        float& x = s[4 * j + 2 * r + b];
        x = exp2_of(fmaf(x, rows.factor[r], minus));
        total[r] += x;
      }
    }
  }
  return rises;
}

template <class S>
__device__ inline void attend(const Attention& a, u32 shared, const Barriers<S>& barriers) {
  constexpr int kSteps = S::kKeys / 16;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32, t = lane % 4;
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpgroup) - 1, 0);
  const int row = group * 64 + thread / 32 * 16 + lane / 4;
  if (group == 1) announce(1, 2 * kWarpgroup);  // the first go is the first warpgroup's

  Announced<S> announced;
  int slot = 0;
  u32 parity = 0;
  const auto pack = [](const float(&s)[S::kKeys / 2], u32(&p)[S::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < S::kKeys / 4; ++i)
      p[i] = S::kBf16 ? pair_bf16(s[2 * i], s[2 * i + 1]) : pair_f16(s[2 * i], s[2 * i + 1]);
  };
  const auto ask_scores = [&](float(&s)[S::kKeys / 2], const u32(&q)[8][4], int at) {
    const u32 keys = uniform(shared + at * 2 * S::kBytes);
    multiply_keys<S::kBf16, false>(s, q[0], descriptor<16>(keys));
#pragma unroll
    for (int i = 1; i < 8; ++i)
      multiply_keys<S::kBf16, true>(s, q[i], descriptor<16>(keys + i / 4 * S::kKeys * 128 + i % 4 * 32));
    wgmma_commit();
  };
  const auto ask_outputs = [&](float(&out)[64], const u32(&p)[S::kKeys / 4], int at) {
    const u32 values = uniform(shared + at * 2 * S::kBytes + S::kBytes);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      multiply_values<S::kBf16>(out, p + 4 * i, descriptor<S::kKeys * 128>(values + i * 2048));
    wgmma_commit();
  };

  for (Item item; (item = announced.next(shared, barriers)).tiles > 0;) {
    Rows rows;
    u32 q[8][4], p[S::kKeys / 4];
    float s[S::kKeys / 2], out[64], highest[2] = {kLowest, kLowest}, total[2] = {0.0f, 0.0f}, before[2] = {1.0f, 1.0f};
    load_queries<S>(a, item, row, t, rows, q);
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] = 0.0f;
    const auto hide_what_is_hidden = [&](int tile) {
      const int key0 = item.base + tile * S::kKeys;
      if (key0 + S::kKeys - 1 > item.low || key0 <= item.high - a.window) hide<S>(s, rows, key0 + 2 * t, a.window);
    };

    int tile = item.tiles - 1;
    barrier_wait(barriers.full_keys(slot), parity);
    wgmma_fence();
    ask_scores(s, q, slot);
    wgmma_wait<0>(s);
    if (lane == 0) barrier_arrive(barriers.empty_keys(slot));
    hide_what_is_hidden(tile);
    soften<S>(s, rows, highest, total, before);
    pack(s, p);

    int next = slot;
    u32 next_parity = parity;
    advance<S::kReady>(next, next_parity);
    if (tile > 0) barrier_wait(barriers.full_keys(next), next_parity);
    while (--tile >= 0) {
      meet(1 + group, 2 * kWarpgroup);
      wgmma_fence();
      ask_scores(s, q, next);
      barrier_wait(barriers.full_values(slot), parity);
      wgmma_fence();
      ask_outputs(out, p, slot);
      announce(2 - group, 2 * kWarpgroup);
      wgmma_wait<1>(s);
      if (lane == 0) barrier_arrive(barriers.empty_keys(next));
      const int done = slot;
      slot = next;
      parity = next_parity;
      advance<S::kReady>(next, next_parity);
      hide_what_is_hidden(tile);
      const bool rises = soften<S>(s, rows, highest, total, before);
      settle(s);
      // Here, not where it is needed: ptxas puts softmax off behind the wait for the outputs but for a branch between.
      if (tile > 0) barrier_wait(barriers.full_keys(next), next_parity);
      wgmma_wait<0>(out);
      hold(p);
      if (lane == 0) barrier_arrive(barriers.empty_values(done));
      pack(s, p);
      if (rises) {
#pragma unroll
        for (int i = 0; i < 64; ++i) out[i] *= before[i / 2 % 2];
      }
    }
    barrier_wait(barriers.full_values(slot), parity);
    wgmma_fence();
    ask_outputs(out, p, slot);
    wgmma_wait<0>(out);
    hold(p);
    if (lane == 0) barrier_arrive(barriers.empty_values(slot));
    slot = next;
    parity = next_parity;
    write_outputs<S>(a, announced.last(shared), rows, row, t, out, highest, total);
  }
}

template <class S>
__device__ inline void paged_prefill(const Attention& a, const Maps& maps, u8* all) {
  u8* aligned = all + (-shared_address(all) & 1023);
  const u32 shared = shared_address(aligned);
  const Barriers<S> barriers{shared + S::kBarriers};
  int* scan = reinterpret_cast<int*>(aligned + S::kScan);
  int* firsts = reinterpret_cast<int*>(aligned + S::kFirsts);
  const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(kAllLanes, thread / 32, 0);

  if (thread == 0) {
    for (int i = 0; i < S::kLanding; ++i) {
      barrier_init(barriers.landed_keys(i), 1);
      barrier_init(barriers.landed_values(i), 1);
      barrier_init(barriers.taken(i), 4);
    }
    for (int i = 0; i < S::kReady; ++i) {
      if (!S::kBf16) barrier_init(barriers.full_keys(i), 4);
      barrier_init(barriers.full_values(i), 4);
      barrier_init(barriers.empty_keys(i), 8);
      barrier_init(barriers.empty_values(i), 8);
    }
    for (int i = 0; i < kItems; ++i) barrier_init(barriers.item(i), 1);
    show_barriers();
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }

  const int items = (request_at(a, thread).tokens * a.group + kRows - 1) / kRows * a.kv_heads;
  int until = items;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, until, step);
    if (lane >= step) until += before;
  }
  static_assert(kThreads >= kMostRequests + 2);
  if (lane == 31) scan[warp] = until;
  __syncthreads();
  int all_items = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp && thread < kMostRequests + 2) firsts[thread] = all_items + until - items;
    all_items += scan[i];
  }
  __syncthreads();

  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    produce<S>(a, maps, shared, firsts, all_items, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    attend<S>(a, shared, barriers);
  }
}

#define VARIANT(keys, type, bf16)                                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_paged_prefill_##type##_##keys(                      \
      const u16* q, const float* k_scale, const float* v_scale, const int* table, const int* lengths,                \
      const int* starts, const u16* gate, u16* out, float* lse, int* counter, i64 q_token, i64 q_head,               \
      i64 table_request, i64 gate_token, i64 gate_head, int k_scale_head, int v_scale_head, int requests,            \
      int tokens, int kv_heads, int group, int page_shift, int box_shift, int window, float score_scale,             \
      const __grid_constant__ Maps maps) {                                                                           \
    extern __shared__ __align__(1024) u8 s_all[];                                                                    \
    const Attention a{q, k_scale, v_scale, table, lengths, starts, gate, out, lse, counter, q_token, q_head,         \
                      table_request, gate_token, gate_head, k_scale_head, v_scale_head, requests, tokens, kv_heads,  \
                      group, page_shift, box_shift, window, score_scale};                                            \
    paged_prefill<Shape<keys, bf16>>(a, maps, s_all);                                                                \
  }

VARIANT(128, e4m3, false)
VARIANT(112, e4m3, false)
VARIANT(128, bf16, true)
VARIANT(112, bf16, true)
