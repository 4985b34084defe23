// What the kernels of attention of many new tokens a request share: the line of work, its copies, the block's frame,
// sums of items that blocks share. Each file has its own shape, operands and products; sm90_paged_prefill.cu says how
// they work.
#pragma once

#include "common/paged_sm90.cuh"

constexpr int kRows = 128;  // of an item
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kItems = 8;         // announced at a time: more than the rings' tiles
constexpr int kLeastShare = 4;    // tiles of a block
constexpr int kPitch = kDim + 4;  // floats of a row's partial sums: its outputs, its maximum, its total

// Shared memory: operands of values (kReady x kBytes), keys (kLanding x kKeyBytes), values that have landed.
template <int kKeys_, bool kBf16_, bool kSplit_, int kBytes_>
struct Layout {
  static constexpr int kKeys = kKeys_;     // of a tile
  static constexpr bool kBf16 = kBf16_;    // the cache's type, else e4m3
  static constexpr bool kSplit = kSplit_;  // blocks share items
  static constexpr int kBytes = kBytes_;   // of a tile of values as the matrix unit takes them
  static constexpr int kStaged = kKeys * kDim;  // as e4m3
  static constexpr int kKeyBytes = kStaged * (kBf16 ? 2 : 1);
  static constexpr int kLanding = kBf16 ? 3 : 4;  // tiles that copies are under way for, of keys until used
  static constexpr int kReady = 3;                // tiles of values made ready; bf16 lands there
  static constexpr int kLead = kLanding - 1;      // tiles asked for before the one that is made ready
  static constexpr int kKeysAt = kReady * kBytes;
  static constexpr int kStaging = kKeysAt + kLanding * kKeyBytes;
  static constexpr int kAnnounced = kStaging + (kBf16 ? 0 : kLanding * kStaged);  // [kItems] Item
  static constexpr int kBarriers = kAnnounced + kItems * 64;
  static constexpr int kScan = kBarriers + (4 * kLanding + 2 * kReady + kItems) * 8;  // [12 warps]
  static constexpr int kFirsts = kScan + 64;  // [requests + 2] first places in the line
  static constexpr int kEnd = kFirsts + (kMostRequests + 2) * 4;
  static_assert(kEnd + 1024 <= 227 * 1024);
};

__device__ inline void announce(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void prefetch_line(const void* line) { asm volatile("prefetch.global.L2 [%0];" ::"l"(line)); }

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
__device__ inline u32 load_pair(const u16* from) {
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// ---- arithmetic ----

__device__ inline float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000u); }

__device__ inline u32 pair_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}

// ---- wgmma: sums (+)= A B, A of 64 rows in registers, B of n columns in shared memory, swizzled by 128 bytes ----

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
#define WGMMA(n, k, types, transposed, list, a0, a1, a2, a3, b, add, ...)                                             \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k" k ".f32." types \
               " {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1" transposed "; }"                 \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "r"(static_cast<int>(kAdd)))

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
  float* partial;        // [2 * blocks, rows, pitch]: of a block's first item and of its last
  i64 q_token, q_head, table_request, gate_token, gate_head;
  int k_scale_head, v_scale_head;
  int requests, fewest;  // requests of fewer new tokens are another kernel's
  int tokens;            // those past starts[requests] get zeros; -1 leaves them alone
  int kv_heads, group, page_shift, box_shift, window, blocks;
  float score_scale;     // softmax_scale * log2(e)
};

struct alignas(16) Item {
  int tiles, base;          // tiles of keys begin at base; none: there are no more items
  int key_first, key_stop;  // keys that any of the item's rows sees
  int low, high;            // positions of the item's first and last token
  int first, rows;          // its rows of the request's; how many the request has
  int token, position;      // the request's first new token: its row of q, its position
  int head, slot;           // slot: of its partial sums, if blocks share it, else -1
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
  if (i < a.requests && r.tokens < a.fewest) r.tokens = 0;
  return r;
}

// Rows' tiles times kv heads.
__device__ inline int items_of(const Attention& a, const Request& r) {
  return (r.tokens * a.group + kRows - 1) / kRows * a.kv_heads;
}
// Keys that any of a request's tokens sees: each of its items has all their tiles in a line of tiles.
template <class S>
struct Span {
  int base, tiles;
  __device__ inline Span(const Attention& a, const Request& r)
      : base(max(0, r.length - r.tokens - a.window + 1) & -(1 << a.box_shift)),
        tiles(max(1, (r.length - base + S::kKeys - 1) / S::kKeys)) {}
};
// How many places of the line a request has; their sums so far go to firsts. Returns the whole line's.
template <class S>
__device__ inline int line_up(const Attention& a, int* scan, int* firsts) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const Request r = request_at(a, thread);
  const int places = items_of(a, r) * (S::kSplit ? Span<S>(a, r).tiles : 1);
  int until = places;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, until, step);
    if (lane >= step) until += before;
  }
  static_assert(kThreads >= kMostRequests + 2);
  if (lane == 31) scan[warp] = until;
  __syncthreads();
  int all = 0;
  for (int i = 0; i < kThreads / 32; ++i) {
    if (i == warp && thread < kMostRequests + 2) firsts[thread] = all + until - places;
    all += scan[i];
  }
  __syncthreads();
  return all;
}
__device__ inline int share_of(const Attention& a, int places) {
  return max(kLeastShare, (places + a.blocks - 1) / a.blocks);
}

// firsts: of requests, their first place; `request` is at most the item's and becomes it. A shared item's part from
// there to `stop` at most, where the block's share, begun at `begin`, ends.
template <class S>
__device__ inline Item item_at(const Attention& a, const int* firsts, int& request, int place, int begin, int stop) {
  while (place >= firsts[request + 1]) ++request;
  const Request r = request_at(a, request);
  const Span<S> span(a, r);
  Item item;
  const int places = S::kSplit ? span.tiles : 1, index = (place - firsts[request]) / places;
  const int from_last = index / a.kv_heads;
  item.head = index - from_last * a.kv_heads;
  item.rows = r.tokens * a.group;
  item.first = ((item.rows + kRows - 1) / kRows - 1 - from_last) * kRows;
  item.token = r.token;
  item.position = r.length - r.tokens;
  item.low = item.position + item.first / a.group;
  item.high = item.position + min((item.first + kRows - 1) / a.group, r.tokens - 1);
  item.key_first = max(0, item.low - a.window + 1);
  item.key_stop = max(0, item.high + 1);
  item.slot = -1;
  if constexpr (S::kSplit) {
    const int tile = place - firsts[request] - index * span.tiles;
    item.base = span.base + tile * S::kKeys;
    item.tiles = min(span.tiles - tile, stop - place);
    if (item.tiles < span.tiles) item.slot = 2 * blockIdx.x + (place != begin);
  } else {
    item.base = item.key_first & -(1 << a.box_shift);
    // Without keys one tile is all hidden: zeros come out.
    item.tiles = max(1, (item.key_stop - item.base + S::kKeys - 1) / S::kKeys);
  }
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
  __device__ u32 empty_keys(int slot) const { return base + (3 * S::kLanding + slot) * 8; }
  __device__ u32 full_values(int slot) const { return base + (4 * S::kLanding + slot) * 8; }
  __device__ u32 empty_values(int slot) const { return base + (4 * S::kLanding + S::kReady + slot) * 8; }
  __device__ u32 item(int slot) const { return base + (4 * S::kLanding + 2 * S::kReady + slot) * 8; }
};


// What each file defines for its shapes.
template <class S>
__device__ void make_values(u32 landed, u32 values, int thread, int low, int high);
template <class S>
__device__ void attend(const Attention& a, u32 shared, const Barriers<S>& barriers);
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
  // The same again, or one before: registers need not keep it. Its place is not used anew before its tiles are.
  __device__ inline Item last(u32 shared, int back = 0) const {
    const u32 from = shared + S::kAnnounced + (slot + kItems - 1 - back) % kItems * 64;
    const uint4 x = load_shared_4(from), y = load_shared_4(from + 16), z = load_shared_4(from + 32);
    Item item;
    item.tiles = __shfl_sync(kAllLanes, static_cast<int>(x.x), 0);  // ptxas shall see that loops are uniform
    item.base = x.y, item.key_first = x.z, item.key_stop = x.w;
    item.low = y.x, item.high = y.y, item.first = y.z, item.rows = y.w;
    item.token = z.x, item.position = z.y, item.head = z.z, item.slot = z.w;
    return item;
  }
};
template <class S>
__device__ inline void announce_item(const Item& item, int slot, u32 shared, const Barriers<S>& barriers) {
  const u32 to = shared + S::kAnnounced + slot * 64;
  store_shared(to, make_uint4(item.tiles, item.base, item.key_first, item.key_stop));
  store_shared(to + 16, make_uint4(item.low, item.high, item.first, item.rows));
  store_shared(to + 32, make_uint4(item.token, item.position, item.head, item.slot));
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
  const int begin, stop;  // of the line, or of this block's share
  int request = 0, place = begin, after = 0;  // after: lane 0's, how many items beyond the first ones were taken before
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
      page = __ldg(a.table + request * a.table_request + (key_of(lane) >> a.page_shift));
  }
  __device__ inline void begin_item(int lane) {
    is_done = place >= stop;
    item.tiles = 0;
    if (!is_done) item = item_at<S>(a, firsts, request, place, begin, stop);
    if (lane == 0) announce_item<S>(item, item_slot, shared, barriers);
    if (++item_slot == kItems) item_slot = 0;
    if (is_done) return;
    if (!S::kSplit && lane == 0) after = atomicAdd(a.counter, 1);
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
      if constexpr (S::kSplit) {
        place += item.tiles;
      } else {
        if (lane == 0 && after == stop - 1) *a.counter = 0;  // nobody takes another
        place = __shfl_sync(kAllLanes, after, 0) + a.blocks;
      }
      begin_item(lane);
      if (is_done) return;
    }
    barrier_wait(barriers.empty_keys(slot), parity);
    barrier_wait(S::kBf16 ? barriers.empty_values(slot) : barriers.taken(slot), parity);
    const bool needed = is_needed(lane);
    const int bytes = __popc(__ballot_sync(kAllLanes, needed)) * (kDim * (S::kBf16 ? 2 : 1) << a.box_shift);
    if (lane == 0) {
      barrier_expect(barriers.landed_keys(slot), bytes);
      barrier_expect(barriers.landed_values(slot), bytes);
    }
    __syncwarp();
    if (needed) {
      const int position = key_of(lane) & ((1 << a.page_shift) - 1);
      const int at = (lane << a.box_shift) * 128;
      const u32 keys = shared + S::kKeysAt + slot * S::kKeyBytes + at;
      const u32 values = S::kBf16 ? shared + slot * S::kBytes + at : shared + S::kStaging + slot * S::kStaged + at;
      constexpr int kHalves = S::kBf16 ? 2 : 1;
#pragma unroll
      for (int i = 0; i < kHalves; ++i)
        copy_box(keys + i * S::kKeys * 128, &maps.k, i * 64, position, item.head, page, barriers.landed_keys(slot));
#pragma unroll
      for (int i = 0; i < kHalves; ++i)
        copy_box(values + i * S::kKeys * 128, &maps.v, i * 64, position, item.head, page, barriers.landed_values(slot));
    }
    advance<S::kLanding>(slot, parity);
    --tile;
    look_up(lane);
  }
};

// ---- four warps make operands of what has landed ----

template <class S>
__device__ inline void produce(const Attention& a, const Maps& maps, u32 shared, const int* firsts, int places,
                               const Barriers<S>& barriers) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int warp = __shfl_sync(kAllLanes, thread / 32, 0);
  const int share = S::kSplit ? share_of(a, places) : 1, begin = blockIdx.x * share;
  Copies<S> copies{a, maps, firsts, barriers, shared, begin, S::kSplit ? min(places, begin + share) : places};
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
      const u32 values = shared + ready * S::kBytes;
      barrier_wait(barriers.landed_values(landing), landing_parity);
      if constexpr (S::kBf16) {
        make_values<S>(values, values, thread, low, high);
        __syncwarp();
      } else {
        barrier_wait(barriers.empty_values(ready), ready_parity);
        make_values<S>(shared + S::kStaging + landing * S::kStaged, values, thread, low, high);
        show_to_engines();
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.taken(landing));
      }
      if (lane == 0) barrier_arrive(barriers.full_values(ready));
      advance<S::kLanding>(landing, landing_parity);
      advance<S::kReady>(ready, ready_parity);
      if (warp == 0) copies.next(lane);
    }
  }
}

// ---- two warpgroups: products and softmax of 64 rows each ----

// A thread has two rows, r and r + 8 of the warp's 16.

// Row `row` of the item, or its last: the token it is of.
__device__ inline int token_of(const Attention& a, const Item& item, int row) {
  return min(item.first + row, item.rows - 1) / a.group;
}

template <class S>
__device__ inline float v_scale_of(const Attention& a, int kv_head) {
  return S::kBf16 ? 1.0f : __ldg(a.v_scale + kv_head * a.v_scale_head);
}
// What a row's sums are multiplied by. If `writes`, their log goes to lse, where that is wanted; sum is times 2^-shift.
template <class S>
__device__ inline float output_scale(const Attention& a, int token, int head, float scale, float shift, float sum,
                                     bool writes) {
  if (a.gate != nullptr) {
    const u32 gate = __ldg(a.gate + token * a.gate_token + head * a.gate_head);
    scale = __fdividef(scale, 1.0f + __expf(-__uint_as_float(gate << 16)));
  }
  if (a.lse != nullptr && writes)
    a.lse[static_cast<i64>(token) * a.kv_heads * a.group + head] = (shift + log2f(sum) - S::kLift) * 0.69314718f;
  return sum == 0.0f ? 0.0f : scale / sum;
}

template <class S>
__device__ inline void hide(float (&s)[S::kKeys / 2], const int (&position)[2], int key0, int window) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int behind = position[r] - key0;
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

// ---- the block ----

template <class S>
__device__ inline void paged_prefill(const Attention& a, const Maps& maps, u8* all) {
  u8* aligned = all + (-shared_address(all) & 1023);
  const u32 shared = shared_address(aligned);
  const Barriers<S> barriers{shared + S::kBarriers};
  int* scan = reinterpret_cast<int*>(aligned + S::kScan);
  int* firsts = reinterpret_cast<int*>(aligned + S::kFirsts);
  const int thread = threadIdx.x, warp = __shfl_sync(kAllLanes, thread / 32, 0);

  if (thread == 0) {
    for (int i = 0; i < S::kLanding; ++i) {
      barrier_init(barriers.landed_keys(i), 1);
      barrier_init(barriers.landed_values(i), 1);
      barrier_init(barriers.taken(i), 4);
      barrier_init(barriers.empty_keys(i), 8);
    }
    for (int i = 0; i < S::kReady; ++i) {
      barrier_init(barriers.full_values(i), 4);
      barrier_init(barriers.empty_values(i), 8);
    }
    for (int i = 0; i < kItems; ++i) barrier_init(barriers.item(i), 1);
    show_barriers();
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int places = line_up<S>(a, scan, firsts);
  if (warp < 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    produce<S>(a, maps, shared, firsts, places, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    attend<S>(a, shared, barriers);
  }
}

// A warp adds up what blocks have of a row: relative to the highest maximum, in the order of the keys' tiles.
template <class S>
__device__ inline void combine(const Attention& a) {
  __shared__ int scan[kThreads / 32], firsts[kMostRequests + 2];
  const int places = line_up<S>(a, scan, firsts), share = share_of(a, places);
  wait_for_previous_kernel();
  let_next_kernel_start();

  const int lane = threadIdx.x % 32, heads = a.kv_heads * a.group;
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, token = row / heads, head = row - token * heads;
  if (token >= a.tokens) return;
  int request = -1;
  for (int first = 0; first <= a.requests; first += 32) {
    const int i = first + lane;
    request += __popc(__ballot_sync(kAllLanes, i <= a.requests && __ldg(a.starts + i) <= token));
  }
  const Request r = request_at(a, request);
  if (r.tokens == 0) return;
  const int tiles = Span<S>(a, r).tiles, kv_head = head / a.group;
  const int at = (token - r.token) * a.group + head - kv_head * a.group;
  const int from_last = (r.tokens * a.group - 1) / kRows - at / kRows;
  const int place = firsts[request] + (from_last * a.kv_heads + kv_head) * tiles;
  const int begin = place / share, end = (place + tiles - 1) / share;
  if (begin == end) return;
  const auto sums_of = [&](int block) {
    const i64 slot = 2 * block + (block * share < place);
    return a.partial + (slot * kRows + at % kRows) * kPitch;
  };
  float highest = kLowest, total = 0.0f;
  for (int i = begin + lane; i <= end; i += 32) highest = fmaxf(highest, sums_of(i)[kDim]);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, step));
  float4 out{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
  for (int i = begin; i <= end; ++i) {
    const float* from = sums_of(i);
    const float4 x = reinterpret_cast<const float4*>(from)[lane];
    const float2 of = *reinterpret_cast<const float2*>(from + kDim);
    const float weight = exp2_of(of.x - highest);
    total = fmaf(of.y, weight, total);
    out.x = fmaf(x.x, weight, out.x);
    out.y = fmaf(x.y, weight, out.y);
    out.z = fmaf(x.z, weight, out.z);
    out.w = fmaf(x.w, weight, out.w);
  }
  const float shift = highest == kLowest ? 0.0f : highest;
  const float scale = output_scale<S>(a, token, head, v_scale_of<S>(a, kv_head), shift, total, lane == 0);
  reinterpret_cast<uint2*>(a.out + static_cast<i64>(row) * kDim)[lane] =
      make_uint2(pair_bf16(out.x * scale, out.y * scale), pair_bf16(out.z * scale, out.w * scale));
}

#define KERNEL(name, ...)                                                                                            \
  extern "C" __global__ void __launch_bounds__(kThreads, 1) sm90_paged_prefill_##name(                               \
      const u16* q, const float* k_scale, const float* v_scale, const int* table, const int* lengths,                \
      const int* starts, const u16* gate, u16* out, float* lse, int* counter, float* partial, i64 q_token,           \
      i64 q_head, i64 table_request, i64 gate_token, i64 gate_head, int k_scale_head, int v_scale_head,              \
      int requests, int fewest, int tokens, int kv_heads, int group, int page_shift, int box_shift, int window,      \
      int blocks, float score_scale, const __grid_constant__ Maps maps) {                                            \
    extern __shared__ __align__(1024) u8 s_all[];                                                                    \
    const Attention a{q, k_scale, v_scale, table, lengths, starts, gate, out, lse, counter, partial, q_token,        \
                      q_head, table_request, gate_token, gate_head, k_scale_head, v_scale_head, requests, fewest,    \
                      tokens, kv_heads, group, page_shift, box_shift, window, blocks, score_scale};                  \
    __VA_ARGS__;                                                                                                     \
  }
