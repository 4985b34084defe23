// NVFP4 weights times a few bf16 tokens on Hopper's FP8 tensor cores, at the speed of the memory (csrc/README.md).
//
// Work is a line of units (64 rows x 256 k) in the order they lie in memory; each block takes an equal share of it and
// its warpgroups take the share's units in turn:
//
//   line      | row 0: unit 0 1 2 .. | row 1: 0 1 2 .. | ...        a row = the 64 rows of a tile, all of k
//   block b   |            ^ begin ................ ^ end |
//   group g   |            g   g+groups   g+2*groups  ..  |         codes and scales come by bulk copies, kDepth units ahead
//
// The tokens of x become columns of B once a block (and again where its share enters another tile or window of k):
// x = 2^e (hi + lo), hi in e4m3 and lo in e5m2, exact within 2^13 of the largest of 256 neighbours. A k32 step covers two
// scale blocks, so a token has a column for each, zero outside it, and the sums stay apart until they are scaled in f32.
// At most two tokens: hi and 16 lo (e4m3) are columns of their own; more: the product adds A lo to A hi.
//
// Waiting: warpgroups meet where B is built and where a row ends. Of a row that blocks share, the block with its first
// unit adds up the others' parts in their order as they come: a part has come when its slot in `partial` is no longer
// absent. Blocks take shares from the line's end backwards, so they wait only for blocks that started before them.
#pragma once
#include "common/dependent_launch.cuh"
#include "common/nvfp4_sm90.cuh"

constexpr int kUnitChunks = 4;
constexpr int kUnitK = kUnitChunks * kTileK;
constexpr int kUnitBytes = kUnitChunks * (kTileCodes + kTileScales);
constexpr int kSlotBytes = kUnitBytes + 128;  // of a ring: a unit and the mbarrier that its copies complete
constexpr int kMostPairs = 256;  // routed (token, slot) pairs that a block can sort
constexpr int kMostExperts = 512;
constexpr float kRange = 0x1p59f;  // sums are kept times 2^-59, which makes |x| from 2^-70 to 2^71 exact to f32
constexpr int kFactorBias = 57;    // kRange's other side: (e + 57) << 23 is 2^(e - 127) * 2^57

// kTokens columns' worth of everything. Windows and depths are what shared memory holds: with up to four tokens two
// blocks share a multiprocessor: one works while the other ends a row, or is the next kernel's and fetches ahead.
template <int kTokens_>
struct Shape {
  static constexpr int kTokens = kTokens_;
  static constexpr bool kSplit = kTokens == 2;
  static constexpr int kColumns = kSplit ? 8 : 2 * kTokens;
  static constexpr int kSums = kColumns / 2;           // of a thread, a k32 step
  static constexpr int kTotals = kSplit ? 2 : kSums;   // of a thread, a row
  static constexpr int kBlocks = kTokens == 8 ? 1 : 2;  // on a multiprocessor
  static constexpr int kGroups = kTokens == 8 ? 3 : 2;
  static constexpr int kThreads = kGroups * kWarpgroup;
  static constexpr int kDepth = kTokens == 2 ? 4 : kTokens == 4 ? 2 : 3;
  static constexpr int kWindow = 16;  // units of k whose columns are kept
  static constexpr int kUnitColumns = 1024 * kTokens;  // bytes
  static constexpr int kStepColumns = kUnitColumns / 8;
  static constexpr int kPitch = kSplit ? 80 : 72;      // floats of a token's rows: stores of a warp differ in bank
  static constexpr int kRing = kWindow * kUnitColumns;
  static constexpr int kFactors = kRing + kGroups * kDepth * kSlotBytes;
  static constexpr int kSum = kFactors + kWindow * kTokens * 4;
  static constexpr int kRouting = kSum + kGroups * kTokens * kPitch * 4;
  static constexpr int kBytes = kRouting + 4 * kMostExperts + 16 + 8 * kMostPairs;
  static_assert(kBytes <= (kBlocks == 1 ? 227 : 113) * 1024);
};

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

__device__ inline void meet_group(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }
// The same once `loaded`, of which only `none` = 0 is kept, is in registers. A barrier alone does not wait for a warp's
// loads from shared memory, and the copy engine does not queue behind them: of 10^8 units of experts at 6 to 8 tokens
// about four were multiplied with one warp's scales of the unit that was copied over them.
__device__ inline void meet_group(int group, u32 loaded, u32 none) { meet_group(group + (loaded & none)); }

__device__ inline void prefetch_l2(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

// A pair of sums that another block waits for; kAbsent's bits, which no sum has, until it comes.
constexpr u32 kAbsent = 0xFFFFFFFF;
__device__ inline void publish(float2* to, float a, float b) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(a), "f"(b) : "memory");
}
__device__ inline float2 published(const float2* from) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}
__device__ inline bool absent(const float2& v) {
  return __float_as_uint(v.x) == kAbsent || __float_as_uint(v.y) == kAbsent;
}

// A barrier in shared memory that one thread arrives at and copies complete.
__device__ inline void make_barrier(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void expect_copies(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait_for_copies(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier), "r"(parity)
      : "memory");
}
// Addresses and size are multiples of 16 bytes.
__device__ inline void copy_bulk(u32 to, const u8* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
template <int kOffset>
__device__ inline uint4 load_shared_4(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at), "n"(kOffset) : "memory");
  return v;
}
template <int kOffset>
__device__ inline u32 load_shared(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(at), "n"(kOffset) : "memory");
  return v;
}
// Keeps a value in a register where the compiler would compute it again each time.
__device__ inline void keep(u32& x) { asm volatile("" : "+r"(x)); }

// d (+)= A B of m64 n8 k32; A e5m2 or e4m3 in registers, B e4m3 or e5m2 in shared memory.
#define WGMMA_N8(A, B, ADD)                                                                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " #ADD ", 0; wgmma.mma_async.sync.aligned.m64n8k32.f32." A "." B      \
               " {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p, 1, 1; }"                                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_N16(A, B, ADD)                                                                                         \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " #ADD ", 0; wgmma.mma_async.sync.aligned.m64n16k32.f32." A "." B     \
               " {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, p, 1, 1; }"                                        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Of B's descriptor the low word: address / 16 and the stride between its 8 x 16 byte matrices along k; the high word is
// their stride along the columns.
template <class S>
__device__ inline u32 describe(u32 address) { return address >> 4 | S::kColumns << 16; }
__device__ inline u64 descriptor(u32 low) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "r"(low), "n"(8));
  return r;
}

template <class S, bool kFirst>
__device__ inline void multiply(float (&d)[S::kSums], const u32 (&a)[4], u32 columns) {
  u64 b = descriptor(columns);
  const u64 low = descriptor(columns + (S::kStepColumns / 2 >> 4));
  if constexpr (S::kSplit) {
    if constexpr (kFirst) WGMMA_N8("e5m2", "e4m3", 0);
    else WGMMA_N8("e4m3", "e4m3", 0);
  } else if constexpr (S::kColumns == 8) {
    if constexpr (kFirst) WGMMA_N8("e5m2", "e4m3", 0);
    else WGMMA_N8("e4m3", "e4m3", 0);
    b = low;
    if constexpr (kFirst) WGMMA_N8("e5m2", "e5m2", 1);
    else WGMMA_N8("e4m3", "e5m2", 1);
  } else {
    if constexpr (kFirst) WGMMA_N16("e5m2", "e4m3", 0);
    else WGMMA_N16("e4m3", "e4m3", 0);
    b = low;
    if constexpr (kFirst) WGMMA_N16("e5m2", "e5m2", 1);
    else WGMMA_N16("e4m3", "e5m2", 1);
  }
}

// Two chunks (four k32 steps) into d; `b` describes the columns of the first step.
template <class S>
__device__ inline void multiply_chunks(float (&d)[4][S::kSums], const uint4& x, const uint4& y, u32 b) {
  const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
  u32 a[4][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    a[0][j] = first_e5m2(xs[j]);
    a[1][j] = second_e4m3(xs[j]);
    a[2][j] = first_e5m2(ys[j]);
    a[3][j] = second_e4m3(ys[j]);
  }
  constexpr int kStep = S::kStepColumns >> 4;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply<S, true>(d[0], a[0], b);
  multiply<S, false>(d[1], a[1], b + kStep);
  multiply<S, true>(d[2], a[2], b + 2 * kStep);
  multiply<S, false>(d[3], a[3], b + 3 * kStep);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <class S, int kPending>
__device__ inline void wait_for_products(float (&d)[4][S::kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < 4 * S::kSums; ++i) asm volatile("" : "+f"(d[i / S::kSums][i % S::kSums])::"memory");
}

// total (+)= scale * d of one step; rows g and g + 8 have a scale each.
template <class S, bool kStart>
__device__ inline void add_scaled(float (&total)[S::kTotals], const float (&d)[S::kSums], float s0, float s1) {
  if constexpr (S::kSplit) {
    const float v0 = fmaf(d[1], 0.0625f, d[0]), v1 = fmaf(d[3], 0.0625f, d[2]);
    total[0] = kStart ? s0 * v0 : fmaf(s0, v0, total[0]);
    total[1] = kStart ? s1 * v1 : fmaf(s1, v1, total[1]);
  } else {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      const float s = i & 2 ? s1 : s0;
      total[i] = kStart ? s * d[i] : fmaf(s, d[i], total[i]);
    }
  }
}

template <class S, bool kStart>
__device__ inline void add_chunks(float (&total)[S::kTotals], const float (&d)[4][S::kSums], u32 x, u32 y) {
  add_scaled<S, kStart>(total, d[0], scale_f32<0>(x), scale_f32<1>(x));
  add_scaled<S, false>(total, d[1], scale_f32<2>(x), scale_f32<3>(x));
  add_scaled<S, false>(total, d[2], scale_f32<0>(y), scale_f32<1>(y));
  add_scaled<S, false>(total, d[3], scale_f32<2>(y), scale_f32<3>(y));
}

// Column of a token's scale block h (0, 1) in its group of eight; a thread's two columns share h = t & 1.
template <class S>
__device__ inline int column_of(int token, int h) {
  return S::kSplit ? 4 * token + 2 * h : 4 * (token % 4 / 2) + 2 * h + token % 2;
}

__device__ inline u32 pair_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline u32 pair_e5m2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline void from_pair_e4m3(u32 pair, float& low, float& high) {
  asm("{ .reg .b32 h; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {x, y}, h; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y; }"
      : "=f"(low), "=f"(high)
      : "h"(static_cast<u16>(pair)));
}

// Where one unit of one token comes from: bf16 [256], zeros from k_left on, times `scale`.
struct Source {
  const u16* x;
  int k_left;
  float scale;
};

// A lane's part of it.
struct Raw {
  uint2 low, high;  // k 4j.. and 8 + 4j.. of the lane's block of 16, j = lane % 2
  float scale;
};
__device__ inline Raw load_source(const Source& source) {
  const int lane = threadIdx.x % 32, block = lane / 2;
  const bool inside = block * 16 < source.k_left;
  const uint2 zero = make_uint2(0, 0);
  const uint2* at = reinterpret_cast<const uint2*>(source.x) + block * 4 + lane % 2;
  // From L2: with programmatic launch L1 could hold what was there before the kernel that wrote x.
  return {inside ? __ldcg(at) : zero, inside ? __ldcg(at + 2) : zero, source.scale};
}

// It as columns and the factor 2^e scale; a warp's work.
template <class S>
__device__ inline void build_columns(u8* columns, float* factor, const Raw& raw, int token) {
  const int lane = threadIdx.x % 32, block = lane / 2, j = lane % 2;
  const uint2 zero = make_uint2(0, 0);
  const u32 words[4] = {raw.low.x, raw.low.y, raw.high.x, raw.high.y};
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = max(largest, max(words[i] & 0x7FFFu, words[i] >> 16 & 0x7FFFu));
  const int e = max(__reduce_max_sync(0xFFFFFFFFu, largest) >> 7, 7u);
  const float up = __uint_as_float((261 - e) << 23);  // 2^(134 - e): the largest value lands in [2^7, 2^8)
  u32 hi[2] = {0, 0}, lo[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {  // k = 4j + i and that + 8 are neighbours in B
    const u32 a = words[i / 2] << (i % 2 ? 0 : 16), b = words[2 + i / 2] << (i % 2 ? 0 : 16);
    const float u = __uint_as_float(a & 0xFFFF0000u) * up, v = __uint_as_float(b & 0xFFFF0000u) * up;
    u32 pair = pair_e4m3(u, v);
    float u_hi, v_hi;
    from_pair_e4m3(pair, u_hi, v_hi);
    const u32 rest = S::kSplit ? pair_e4m3(16.0f * (u - u_hi), 16.0f * (v - v_hi)) : pair_e5m2(u - u_hi, v - v_hi);
    hi[i / 2] |= pair << (i % 2 * 16);
    lo[i / 2] |= rest << (i % 2 * 16);
  }
  if (e == 255) hi[0] = hi[1] = 0x7F7F7F7Fu;  // infinity or NaN somewhere: the token's whole result is NaN
  const int step = block / 2, h = block % 2;
  constexpr int kHalf = S::kColumns * 16;  // bytes from a step's first 16 k to its second
  u8* to = columns + step * S::kStepColumns + token / 4 * 128 + column_of<S>(token, h) * 16 + 8 * j;
  constexpr int kLow = S::kSplit ? 16 : S::kStepColumns / 2;
  *reinterpret_cast<uint2*>(to + h * kHalf) = make_uint2(hi[0], hi[1]);
  *reinterpret_cast<uint2*>(to + (1 - h) * kHalf) = zero;
  *reinterpret_cast<uint2*>(to + kLow + h * kHalf) = make_uint2(lo[0], lo[1]);
  *reinterpret_cast<uint2*>(to + kLow + (1 - h) * kHalf) = zero;
  if (lane == 0) *factor = __uint_as_float(min(e + kFactorBias, 255) << 23) * raw.scale;
}

// Columns of `tokens` x `units` sources by this thread's warp, one of `warps`: find(token, unit) says which, k_left < 0
// for none. A warp's loads, of a full window all, are in flight before `requested()`: what that asks memory for comes after.
template <class S, class Find, class Requested>
__device__ inline void build_all(u8* shared, int warp, int warps, int tokens, int units, const Find& find,
                                 const Requested& requested) {
  constexpr int kAtOnce = (S::kTokens * S::kWindow + S::kThreads / 32 - 1) / (S::kThreads / 32);
  int first = warp;
  do {
    Raw raw[kAtOnce];
    bool present[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * warps, token = at / units;
      Source source{nullptr, -1, 0.0f};
      if (at < tokens * units) source = find(token, at - token * units);
      present[i] = source.k_left >= 0;
      raw[i] = load_source(source);
    }
    if (first == warp) requested();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = first + i * warps, token = at / units, unit = at - token * units;
      if (present[i])
        build_columns<S>(shared + unit * S::kUnitColumns,
                         reinterpret_cast<float*>(shared + S::kFactors) + unit * S::kTokens + token, raw[i], token);
    }
    first += kAtOnce * warps;
  } while (first < tokens * units);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline u16 to_bf16(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}

// Rows of a tile in the prepared order: pair p holds rows p_row(p) and p_row(p) + 8.
__device__ inline int pair_row(int pair) { return pair / 8 * 16 + pair % 8; }

__device__ constexpr int chunks_of(int k) { return (k + kTileK - 1) / kTileK; }
__device__ constexpr int units_of(int k) { return (k + kUnitK - 1) / kUnitK; }

// 64 rows of weights of all experts, and a unit among theirs.
struct Place {
  i64 block;
  int unit;
};

// A block's part of a line of `total` units; me < 0 for none.
struct Share {
  int size, me, begin, end;
};
template <class S>
__device__ inline Share share_of(int total) {
  int size = (total + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  // One that is in flight at once should keep all groups as busy.
  if (size <= S::kGroups * S::kDepth) size = (size + S::kGroups - 1) / S::kGroups * S::kGroups;
  const int me = (size ? (total + size - 1) / size : 0) - 1 - static_cast<int>(blockIdx.x);
  return {size, me, me * size, min((me + 1) * size, total)};
}

// What the block will read first when a kernel of the same grid multiplies `task`, from memory to L2: more than memory
// brings while that kernel starts.
template <class S, class Task>
__device__ inline void fetch_ahead(const Task& task, const u8* codes, const u8* scales, int rows, int units,
                                   int chunks) {
  constexpr int kUnits = 12;
  const Share share = share_of<S>(rows * units);
  const int at = share.begin + static_cast<int>(threadIdx.x);
  if (share.me < 0 || threadIdx.x >= kUnits || at >= share.end) return;
  const Place place = task.place(at / units, at % units);
  const i64 tile = place.block * chunks + kUnitChunks * place.unit;
  const u32 count = min(kUnitChunks, chunks - kUnitChunks * place.unit);
  prefetch_l2(codes + tile * kTileCodes, count * kTileCodes);
  prefetch_l2(scales + tile * kTileScales, count * kTileScales);
}

// Task: what to multiply, `rows` of `units` each.
//   place(row, unit)         the weights there; a block of them has `chunks` chunks of k
//   columns_of(row)          the set of tokens that the row multiplies; rows of a set are neighbours and end at rows_end(set)
//   tokens(set)              at most kTokens
//   source(set, token, unit) its activations, there after wait_for_activations()
//   fetched_all()            called when the block has all its weights, by all threads
//   finish(row, token, pair, a, b)   takes the sums of the pair's rows
//   kEarly                   units a group asks for before wait_for_activations(): what memory brings in that time
template <class S, class Task>
__device__ void decode(const Task& task, u8* shared, const u8* codes, const u8* scales, int rows, int units, int chunks,
                       float* partial) {  // [blocks, tokens, 64], absent before and after
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  const Share own = share_of<S>(rows * units);
  const int share = own.size, me = own.me, begin = own.begin, end = own.end;
  if (me < 0) {
    task.wait_for_activations();  // a kernel that has ended vouches for those before it
    return;
  }

  // The group's ring and, for its first thread, which fetches, the next unit and how many chunks of k are left in its row.
  // The copy engine brings them. Requests queue in the memory system: a load that follows 144 KB an SM of weights takes
  // 4 us where one alone takes 0.3, so x is asked for behind kEarly units of each group, and the others follow x.
  const u32 ring = shared_address(shared + S::kRing) + group * S::kDepth * kSlotBytes;
  u32 own_codes = ring + thread * 16, own_scales = ring + kUnitChunks * kTileCodes + warp * 64 + g * 8 + (t & 1) * 4;
  keep(own_codes), keep(own_scales);
  int next = begin + group, left = 0;
  const u8 *next_codes = codes, *next_scales = scales;
  const auto find_next = [&] {
    if (next >= end) return;
    const int row = next / units;
    const Place place = task.place(row, next - row * units);
    const i64 tile = place.block * chunks + kUnitChunks * place.unit;
    left = chunks - kUnitChunks * place.unit;
    next_codes = codes + tile * kTileCodes;
    next_scales = scales + tile * kTileScales;
  };
  // Chunks beyond k stay as they are: any code times any scale is finite, and their columns of x are zero.
  const auto fetch = [&](u32 slot) {
    if (next >= end) return;
    const u32 count = min(left, kUnitChunks), filled = slot + kUnitBytes;
    expect_copies(filled, count * (kTileCodes + kTileScales));
    copy_bulk(slot, next_codes, count * kTileCodes, filled);
    copy_bulk(slot + kUnitChunks * kTileCodes, next_scales, count * kTileScales, filled);
    next += S::kGroups;
    left -= S::kGroups * kUnitChunks;
    next_codes += S::kGroups * kUnitChunks * kTileCodes;
    next_scales += S::kGroups * kUnitChunks * kTileScales;
    if (left <= 0) find_next();
  };
  if (thread == 0) {  // the others meet the barriers after __syncthreads
    for (int i = 0; i < S::kDepth; ++i) make_barrier(ring + i * kSlotBytes + kUnitBytes);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    find_next();
    for (int i = 0; i < Task::kEarly; ++i) fetch(ring + i * kSlotBytes);
  }
  task.wait_for_activations();

  float* factors = reinterpret_cast<float*>(shared + S::kFactors);
  float* sums = reinterpret_cast<float*>(shared + S::kSum);
  const int token0 = S::kSplit ? t / 2 : t / 2 * 2;  // of this thread's first column
  const u32 none = static_cast<u32>(units) >> 31;  // 0, but ptxas does not know
  float total_sum[S::kTotals] = {};
  int mine = begin + group, loaded_set = -1, base = 0;
  u32 at = 0, parity = 0;  // in the group's ring

  for (int unit = begin; unit < end;) {
    const int row = unit / units, k0 = unit - row * units, set = task.columns_of(row);
    if (set != loaded_set || k0 < base || k0 >= base + S::kWindow) {
      loaded_set = set;
      base = units <= S::kWindow ? 0 : k0;
      const int needed = min(end, task.rows_end(set) * units) - unit;  // units of the share that multiply this set
      __syncthreads();
      build_all<S>(shared, threadIdx.x / 32, S::kThreads / 32, task.tokens(set), min(S::kWindow, units - base),
                   [&](int token, int slot) {
                     const int at = base + slot;
                     if ((at >= k0 ? at - k0 : at - k0 + units) >= needed) return Source{nullptr, -1, 0.0f};
                     return task.source(set, token, at);
                   },
                   [&] {
                     if (thread != 0 || unit != begin) return;
#pragma unroll 1
                     for (int i = Task::kEarly; i < S::kDepth; ++i) fetch(ring + i * kSlotBytes);
                   });
      __syncthreads();
    }
    const int stop = min(end, row * units + min(units, base + S::kWindow));
    const int slot0 = row * units + base;  // the unit whose columns are the first
    for (; mine < stop; mine += S::kGroups) {
      wait_for_copies(ring + at + kUnitBytes, parity);
      const uint4 c[kUnitChunks] = {
          load_shared_4<0>(own_codes + at), load_shared_4<kTileCodes>(own_codes + at),
          load_shared_4<2 * kTileCodes>(own_codes + at), load_shared_4<3 * kTileCodes>(own_codes + at)};
      const u32 s[kUnitChunks] = {load_shared<0>(own_scales + at), load_shared<kTileScales>(own_scales + at),
                                  load_shared<2 * kTileScales>(own_scales + at), load_shared<3 * kTileScales>(own_scales + at)};
      float d[2][4][S::kSums], part[S::kTotals];
      // The shuffle tells ptxas that a warp's is one: descriptors stay in uniform registers, 20 instructions fewer.
      const u32 b = __shfl_sync(
          0xFFFFFFFFu, describe<S>(shared_address(shared)) + (mine - slot0) * (S::kUnitColumns >> 4), 0);
      multiply_chunks<S>(d[0], c[0], c[1], b);
      multiply_chunks<S>(d[1], c[2], c[3], b + (S::kUnitColumns / 2 >> 4));
      meet_group(group, s[0] | s[1] | s[2] | s[3], none);  // all have read the slot
      if (thread == 0) fetch(ring + at);
      parity ^= at == (S::kDepth - 1) * kSlotBytes;
      at = at == (S::kDepth - 1) * kSlotBytes ? 0 : at + kSlotBytes;
      wait_for_products<S, 1>(d[0]);
      add_chunks<S, true>(part, d[0], s[0], s[1]);
      wait_for_products<S, 0>(d[1]);
      add_chunks<S, false>(part, d[1], s[2], s[3]);
      const float* factor = factors + (mine - slot0) * S::kTokens + token0;
#pragma unroll
      for (int i = 0; i < S::kTotals; ++i)
        total_sum[i] = fmaf(part[i], factor[S::kSplit ? 0 : i / 4 * 4 + i % 2], total_sum[i]);
    }
    unit = stop;
    if (stop == end) task.fetched_all();
    if (stop != end && stop != (row + 1) * units) continue;

    // The row ends here: add the scale blocks (lanes t, t ^ 1), the groups, and, if others have parts of it, the blocks.
    const int h = t & 1;
    __syncthreads();  // the sums of the row before are used up
    float* to = sums + (group * S::kTokens + token0) * S::kPitch + warp * 16 + g + 8 * h;
#pragma unroll
    for (int i = 0; i < S::kTotals; i += S::kSplit ? 2 : 4) {
#pragma unroll
      for (int a = 0; a < (S::kSplit ? 1 : 2); ++a) {
        const float low = total_sum[i + a], high = total_sum[i + a + (S::kSplit ? 1 : 2)];
        const float other = __shfl_xor_sync(0xFFFFFFFFu, h ? low : high, 1);
        to[(i + a) * S::kPitch] = (h ? high : low) + other;
      }
    }
#pragma unroll
    for (int i = 0; i < S::kTotals; ++i) total_sum[i] = 0.0f;
    __syncthreads();
    const int tokens = task.tokens(set), row_end = (row + 1) * units;
    for (int i = threadIdx.x; i < tokens * 32; i += S::kThreads) {
      const int token = i / 32, pair = i % 32;
      const float* at = sums + token * S::kPitch + pair_row(pair);
      float a = 0.0f, b = 0.0f;
#pragma unroll
      for (int q = 0; q < S::kGroups; ++q) {
        a += at[q * S::kTokens * S::kPitch];
        b += at[q * S::kTokens * S::kPitch + 8];
      }
      const auto slot = [&](int block) { return reinterpret_cast<float2*>(partial) + block * S::kTokens * 32 + i; };
      if (row * units < begin) {
        publish(slot(me), a, b);
        continue;
      }
      constexpr int kAtOnce = 4;  // a way to L2 and back
      for (int other = me + 1; other * share < row_end; other += kAtOnce) {
        float2 v[kAtOnce];
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q)
          if ((other + q) * share < row_end) v[q] = published(slot(other + q));
#pragma unroll
        for (int q = 0; q < kAtOnce; ++q) {
          if ((other + q) * share >= row_end) break;
          while (absent(v[q])) v[q] = published(slot(other + q));
          a += v[q].x;
          b += v[q].y;
          *slot(other + q) = make_float2(__uint_as_float(kAbsent), __uint_as_float(kAbsent));
        }
      }
      task.finish(row, token, pair, a, b);
    }
  }
}
