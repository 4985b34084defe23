// NVFP4 weights x bf16 activations for many tokens on Hopper: dense products and the routed experts' two.
//
//   out[token, row] = global_scale * sum over k of x[token, k] * code[row, k] * block_scale[row, k / 16]
//
// A pair of CTAs (a cluster) owns 256 rows x up to 256 tokens; a CTA its half of the rows, a warpgroup 64 of those:
//
//                          tokens (n of wgmma, 32 to 256)
//                        +---------------------------------+
//   CTA 0  warpgroup 1   | 64 rows: codes in registers     |     x: [tokens][64 k] in shared memory, swizzled by 128
//          warpgroup 2   | 64 rows    become bf16 A        |     bytes, kStages deep. Each CTA of the cluster brings
//   CTA 1  warpgroup 1   | 64 rows                         |     every other 32 tokens and multicasts them to both.
//          warpgroup 2   | 64 rows                         |
//                        +---------------------------------+
//
// Warpgroup 0 only issues the copies. A consumer thread loads its 32 codes and 8 scales of a 64 x 64 weight tile (the
// layout is made so that they are its wgmma fragments) four chunks of 64 k ahead, multiplies code by scale in bf16,
// which is exact (2 + 4 significant bits), and issues four wgmma while those of the chunk before still run: 147
// instructions a chunk (4.6 a weight, 2.9 of them the expansion), 294 issue slots of a scheduler for every 1024 clocks
// of tensor core at 256 tokens. The outputs go through shared memory transposed; the copy engine writes them out.
// Waiting: full[stage] on the copies' bytes; empty[stage] on every consumer warp of both CTAs; warpgroup 2 starts two
// chunks after warpgroup 1, so that the tensor cores have work while either stores.
//
// For the experts see sm90_nvfp4_moe_prefill.cu: it makes the table of tiles. An expert's tokens are split evenly into
// tiles of a multiple of 32, so that 257 tokens cost 2 * 160 and not 512. Which tiles exist is decided on the device.

#include "common/nvfp4_sm90.cuh"
#include "common/warp.cuh"

struct alignas(64) TensorMap {
  char bytes[128];
};

struct Maps {
  TensorMap x;    // bf16 [rows, k] in boxes of kBox x 64, swizzled by 128 bytes
  TensorMap out;  // bf16 [rows, n] in boxes of kBox x 64 by 128 bytes, paired: kBox x 32 by 64
};

constexpr int kMostTokens = 256;  // of a tile
constexpr int kBox = 32;          // tokens of one copy
constexpr int kStages = 4;        // chunks in the unrolled loop as well, so that a chunk's stage is a constant
constexpr int kStageBytes = kMostTokens * kTileK * 2;  // a token's 128 bytes are the swizzle's width
constexpr int kSmallTile = 96;    // tokens up to which weights are prefetched into L2,
constexpr int kPrefetched = 8;    // this many chunks before x is copied
constexpr int kLead = 2;          // chunks that warpgroup 1 is ahead: it computes while warpgroup 2 stores
constexpr int kCluster = 2;
constexpr int kBlocks = 2;  // 64-row blocks of a CTA, one a consumer warpgroup
constexpr int kConsumerWarps = 4 * kBlocks;
constexpr int kThreads = 128 * (1 + kBlocks);
constexpr int kStagingBytes = kMostTokens * 128;  // a warpgroup's output, [token][64 rows] bf16

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---- barriers and copies ----

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier, int cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* map, int k, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier), "h"(static_cast<u16>((1 << kCluster) - 1))
      : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, int column, int row, unsigned from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barrier 0 is the block's, 1 and 2 the warpgroups' own.
__device__ __forceinline__ void lead_arrive() { asm volatile("bar.arrive 3, 256;" ::: "memory"); }
__device__ __forceinline__ void lead_wait() { asm volatile("bar.sync 3, 256;" ::: "memory"); }
__device__ __forceinline__ void warpgroup_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// ---- wgmma: D[64 rows, tokens] += A[64, 16] in registers * B[16, tokens] in shared memory, both K-major ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// 1024 bytes from 8 tokens to the next 8, swizzle of 128 bytes (PTX ISA, "Matrix-Descriptor")
__device__ __forceinline__ u64 tile_descriptor(unsigned address) {
  return u64{(address & 0x3ffff) >> 4} | u64{1} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}

template <int kTokens>
struct Wgmma;

#define D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define D3 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define D4 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define D5 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define D6 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define D7 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define WGMMA(tokens, list, a0, a1, a2, a3, b, ...)                                                           \
  template <>                                                                                                      \
  struct Wgmma<tokens> {                                                                                           \
    static __device__ __forceinline__ void run(float* d, const unsigned* a, u64 descriptor) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens    \
                   "k16.f32.bf16.bf16 {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b                     \
                   ", 1, 1, 1, 0;"                                                                              \
                   : __VA_ARGS__                                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));               \
    }                                                                                                              \
  };
WGMMA(32, D0, 16, 17, 18, 19, 20, R16(0))
WGMMA(64, D0 D1, 32, 33, 34, 35, 36, R16(0), R16(16))
WGMMA(96, D0 D1 D2, 48, 49, 50, 51, 52, R16(0), R16(16), R16(32))
WGMMA(128, D0 D1 D2 D3, 64, 65, 66, 67, 68, R16(0), R16(16), R16(32), R16(48))
WGMMA(160, D0 D1 D2 D3 D4, 80, 81, 82, 83, 84, R16(0), R16(16), R16(32), R16(48), R16(64))
WGMMA(192, D0 D1 D2 D3 D4 D5, 96, 97, 98, 99, 100, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80))
WGMMA(224, D0 D1 D2 D3 D4 D5 D6, 112, 113, 114, 115, 116, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
      R16(96))
WGMMA(256, D0 D1 D2 D3 D4 D5 D6 D7, 128, 129, 130, 131, 132, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
      R16(96), R16(112))

// ---- weights ----

struct Weights {  // a thread's part of a 64 x 64 tile
  uint4 codes;
  uint2 scales;
};

__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
  unsigned d;
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// Byte r of `scales`, unsigned e5m3, as two equal bf16 whose exponent field is the byte's plus `base`'s.
template <int kByte>
__device__ __forceinline__ unsigned scale_pair(unsigned scales, unsigned base) {
  return __byte_perm(scales, 0, 0x4040 | kByte | kByte << 8) * 16 + base;
}

// The four A fragments of a tile, code * scale * 2^-8. A code's bits, put where bf16 has its sign, its exponent's
// lowest two and its mantissa's highest, are the code's value * 2^-126; the scale's exponent makes up for that. A zero
// scale byte would become a power of two as well: its codes are cleared first, in the few tiles that have one.
__device__ __forceinline__ void expand(const Weights& weights, unsigned (&a)[4][4]) {
  constexpr unsigned kSign = 0x80008000u, kValue = 0x01c001c0u;
  // exponent fields that turn scale * 2^bias into scale * 2^(126 - 8): bf16's own bias is 127
  constexpr unsigned kFirst = 0x00010001u * ((126 + 127 - 8 - kFirstBias) << 7);
  constexpr unsigned kSecond = 0x00010001u * ((126 + 127 - 8 - kSecondBias) << 7);
  unsigned words[4] = {weights.codes.x, weights.codes.y, weights.codes.z, weights.codes.w};
  const unsigned scales[2] = {weights.scales.x, weights.scales.y};
  const unsigned zeros =
      (((scales[0] - 0x01010101u) & ~scales[0]) | ((scales[1] - 0x01010101u) & ~scales[1])) & 0x80808080u;
  if (__any_sync(kAllLanes, zeros)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned pair = scales[j / 2] >> (8 * (j % 2));
      words[j] &= (pair & 0xff ? 0x8e8e8e8eu : 0) | (pair & 0xff0000 ? 0x71717171u : 0);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const unsigned first[2] = {scale_pair<0>(scales[h], kFirst), scale_pair<1>(scales[h], kFirst)};
    const unsigned second[2] = {scale_pair<2>(scales[h], kSecond), scale_pair<3>(scales[h], kSecond)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned w = words[2 * h + r];
      a[h][r] = multiply(((w << 5) & kValue) | ((w << 8) & kSign), first[r]);
      a[h][r + 2] = multiply(((w >> 3) & kValue) | (w & kSign), first[r]);
      a[h + 2][r] = multiply(((w << 2) & kValue) | ((w << 15) & kSign), second[r]);
      a[h + 2][r + 2] = multiply(((w >> 6) & kValue) | ((w << 7) & kSign), second[r]);
    }
  }
}

// ---- tiles ----

struct Work {
  const int4* tiles;       // [*tile_count] {expert, first row of x, tokens, 0}, or null: one weight, tiles alike
  const int* tile_count;
  int token_tiles;         // without `tiles`
  int tile_tokens;         // without `tiles`: of each, a multiple of kBox
  int group;               // token tiles that go through the rows together
  int row_tiles;           // of a cluster: ceil(blocks / (kCluster * kBlocks))
  __device__ int count() const { return (tiles ? *tile_count : token_tiles) * row_tiles; }
};

struct Tile {
  int expert, first, tokens, row_tile;
};

__device__ __forceinline__ Tile tile_at(const Work& work, int index) {
  if (work.tiles) {
    const int4 tile = __ldg(work.tiles + index / work.row_tiles);
    return {tile.x, tile.y, tile.z, index % work.row_tiles};
  }
  const int each = work.group * work.row_tiles, first = index / each * work.group;
  const int size = min(work.group, work.token_tiles - first), token_tile = first + index % each % size;
  return {0, token_tile * work.tile_tokens, work.tile_tokens, index % each / size};
}

struct Weight {
  const uint4* codes;         // [experts, blocks, chunks, 128]
  const uint2* scales;        // [experts, blocks, chunks, 32]
  const float* global_scale;  // [experts, parts]
  int blocks, chunks;         // of 64 rows, of 64 k
  int parts;                  // equal ranges of rows
  int rows;                   // that are not padding; paired: half of them
};

__device__ __forceinline__ int block_of(const Tile& tile, int cta, int group) {
  return (tile.row_tile * kCluster + cta) * kBlocks + group;
}

// The number of the first 64 x 64 weight tile; a block beyond the last computes that one again and is not written.
__device__ __forceinline__ int first_weights(const Weight& weight, const Tile& tile, int cta, int group) {
  return (tile.expert * weight.blocks + min(block_of(tile, cta, group), weight.blocks - 1)) * weight.chunks;
}

// Four chunks of this CTA's weights on their way to L2: few tokens leave too little time for memory's latency.
__device__ __forceinline__ void prefetch(const Weight& weight, const Tile& tile, int cta, int chunk) {
  const int count = min(kStages, weight.chunks - chunk);
  if (count <= 0) return;
#pragma unroll 1
  for (int group = 0; group < kBlocks; ++group) {
    const long long at = first_weights(weight, tile, cta, group) + chunk;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight.codes + at * 128), "r"(count * kTileCodes));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight.scales + at * 32), "r"(count * kTileScales));
  }
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void store_transposed(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Step's SwiGLU (ops/swiglu.py); comparisons, not fmin, so that NaN passes
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = __fdividef(gate, 1.0f + __expf(-gate));
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * up;
}

// The thread's number in its warpgroup, read anew: what follows from it takes no registers in the main loops.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}

// Read where it is used: kept from the start, it is spilled.
__device__ __forceinline__ int cluster_number() {
  int number;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return number;
}

struct Consumer {
  const Work& work;
  const Weight& weight;
  const TensorMap* out;
  float limit;
  unsigned stages, full, empty, staging;
  int group, thread, cta;  // warpgroup 0 or 1, thread in it
  unsigned parity;
  bool leads;  // has not let the other warpgroup start yet
  Weights ahead[kStages];

  // Weight tile i of four, `left` of which exist; beyond them the last one again, to meet x's zeros.
  __device__ __forceinline__ void load(int first, int left, int i) {
    const long long at = first + min(i, left - 1);
    ahead[i].codes = load_once(weight.codes + at * 128 + thread);
    ahead[i].scales = load_once(weight.scales + at * 32 + thread / 4);
  }

  __device__ __forceinline__ void release(int stage) {
    if (thread % 32 < kCluster) barrier_arrive(empty + 8 * stage, thread % 32);
  }

  // Leaves the first weight tiles of the next tile, from number `next` on, in `ahead`.
  template <int kTokens, bool kPaired>
  __device__ __forceinline__ void run(const Tile& tile, int current, int next) {
    float d[kTokens / 2];  // cleared by hand: by wgmma's predicate, ptxas has it live through every other tile size
#pragma unroll
    for (float& v : d) v = 0.0f;
    unsigned a[2][4][4];
#pragma unroll 1
    for (int chunk = 0; chunk < weight.chunks; chunk += kStages) {
      const bool last = chunk + kStages >= weight.chunks;
      const int first = last ? next : current + chunk + kStages;
      const int left = weight.chunks - (last ? 0 : chunk + kStages);
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        expand(ahead[i], a[i % 2]);
        load(first, left, i);
        barrier_wait(full + 8 * i, parity);
        wgmma_fence();
        const u64 x = tile_descriptor(stages + i * kStageBytes);
#pragma unroll
        for (int q = 0; q < 4; ++q) Wgmma<kTokens>::run(d, a[i % 2][q], x + 2 * q);
        wgmma_commit();
        wgmma_wait<1>();
        if (i > 0 || chunk > 0) release((i + kStages - 1) % kStages);
        if (i == kLead - 1 && leads) {
          lead_arrive();
          leads = false;
        }
      }
      parity ^= 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (float& v : d) asm volatile("" : "+f"(v)::"memory");  // nothing reads the sums before this
    release(kStages - 1);
    kPaired ? store_paired<kTokens>(d, tile) : store_plain<kTokens>(d, tile);
  }

  // The fragments' 2^-8 goes into the factors, or into the sums where a factor has no room for it.
  template <int kTokens>
  __device__ __forceinline__ void undo_debt(float* d, float& low, float& high) {
    if (fmaxf(fabsf(low), fabsf(high)) < 0x1p119f) {
      low *= 256.0f;
      high *= 256.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) d[i] *= 256.0f;
    }
  }

  // A thread holds rows r = 16 * warp + lane / 4 and r + 8 of tokens 8 * j + 2 * (lane % 4) and the next in d[4 j ...].
  template <int kTokens>
  __device__ __forceinline__ void store_plain(float* d, const Tile& tile) {
    const int thread = thread_anew(), lane = thread % 32, warp = thread / 32, column = block_of(tile, cta, group) * 64;
    const int row = column + 16 * warp + lane / 4;
    const float* global_scale = weight.global_scale + static_cast<long long>(tile.expert) * weight.parts;
    const int part_rows = weight.rows / weight.parts;
    float low = __ldg(global_scale + min(row, weight.rows - 1) / part_rows);
    float high = __ldg(global_scale + min(row + 8, weight.rows - 1) / part_rows);
    undo_debt<kTokens>(d, low, high);
    begin_staging();
    const int unit = 2 * warp + lane / 8 % 2, in_pair = lane / 16 * 8 + lane % 8;
    const unsigned to = staging + in_pair * 128 + ((unit ^ lane % 8) << 4);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      unsigned m[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* v = d + 4 * (j + i);
        m[2 * i] = pack(v[0] * low, v[1] * low);
        m[2 * i + 1] = pack(v[2] * high, v[3] * high);
      }
      store_transposed(to + j * 8 * 128, m[0], m[1], m[2], m[3]);
    }
    write<kTokens, 128>(tile, column);
  }

  template <int kTokens>
  __device__ __forceinline__ void store_paired(float* d, const Tile& tile) {
    const int thread = thread_anew(), lane = thread % 32, warp = thread / 32;
    const float* global_scale = weight.global_scale + static_cast<long long>(tile.expert) * weight.parts;
    float low = __ldg(global_scale), high = __ldg(global_scale + weight.parts - 1);
    undo_debt<kTokens>(d, low, high);
    begin_staging();
    const unsigned to = staging + lane * 64 + ((warp ^ lane / 2 % 4) << 4);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 4) {
      unsigned m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* v = d + 4 * (j + i);
        m[i] = pack(swiglu(v[0] * low, v[2] * high, limit),
                    swiglu(v[1] * low, v[3] * high, limit));
      }
      store_transposed(to + j * 8 * 64, m[0], m[1], m[2], m[3]);
    }
    write<kTokens, 64>(tile, block_of(tile, cta, group) * 32);
  }

  // The copy engine writes what is staged while the next tile is computed, and leaves out what is beyond the output.
  __device__ __forceinline__ void begin_staging() {
    if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the tile before has been read
    warpgroup_sync(1 + group);
  }

  template <int kTokens, int kRowBytes>
  __device__ __forceinline__ void write(const Tile& tile, int column) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_sync(1 + group);
    if (thread == 0 && column < weight.rows) {
#pragma unroll
      for (int i = 0; i < kTokens; i += kBox) store_box(out, column, tile.first + i, staging + i * kRowBytes);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
};

template <bool kPaired, int... kTokens>
__device__ __forceinline__ void prefill(const Maps& maps, const Work& work, const Weight& weight, float limit) {
  extern __shared__ char s_bytes[];
  __shared__ u64 s_full[kStages], s_empty[kStages];
  const unsigned stages = (shared_address(s_bytes) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(s_full), empty = shared_address(s_empty);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // uniform: else ptxas serialises wgmma
  const int cta = blockIdx.x % kCluster, clusters = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumerWarps * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int count = work.count();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      unsigned parity = 1;  // a new barrier's: the stages are free
      const int padded = (weight.chunks + kStages - 1) / kStages * kStages;
      for (int index = cluster_number(); index < count; index += clusters) {
        const Tile tile = tile_at(work, index);
        for (int chunk = 0; chunk < weight.chunks; chunk += kStages) {
          if (tile.tokens <= kSmallTile) {
            const int later = chunk + kPrefetched;
            if (later < weight.chunks)
              prefetch(weight, tile, cta, later);
            else if (index + clusters < count)
              prefetch(weight, tile_at(work, index + clusters), cta, later - padded);
          }
#pragma unroll 1
          for (int i = 0; i < kStages; ++i) {
            barrier_wait(empty + 8 * i, parity);
            barrier_expect(full + 8 * i, tile.tokens * kTileK * 2);
#pragma unroll 1
            for (int row = cta * kBox; row < tile.tokens; row += kCluster * kBox)
              copy_box(stages + i * kStageBytes + row * kTileK * 2, &maps.x, (chunk + i) * kTileK, tile.first + row,
                       full + 8 * i);
          }
          parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const unsigned staging = stages + kStages * kStageBytes + (group - 1) * kStagingBytes;
    Consumer consumer = {work, weight, &maps.out, limit, stages, full, empty, staging, group - 1,
                         static_cast<int>(threadIdx.x % 128), cta, 0, group == 1};
    int index = cluster_number();
    if (index < count) {
      Tile tile = tile_at(work, index);
      int current = first_weights(weight, tile, cta, group - 1);
#pragma unroll
      for (int i = 0; i < kStages; ++i) consumer.load(current, weight.chunks, i);
      if (group == 2) lead_wait();
      for (; index < count; index += clusters) {
        const Tile next_tile = tile_at(work, min(index + clusters, count - 1));
        const int next = first_weights(weight, next_tile, cta, group - 1);
        const int tokens = __shfl_sync(kAllLanes, tile.tokens, 0);
        ((tokens == kTokens ? consumer.run<kTokens, kPaired>(tile, current, next) : void()), ...);
        tile = next_tile;
        current = next;
      }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();
  cluster_sync();  // the other CTA may still arrive here
}

#define PRODUCT(name, paired, ...)                                                                              \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)                    \
      name(const uint4* codes, const uint2* scales, const float* global_scale, const int4* tiles,              \
           const int* tile_count, int token_tiles, int tile_tokens, int group, int row_tiles, int blocks,       \
           int chunks, int parts, int rows, float limit, const __grid_constant__ Maps maps) {                   \
    const Work work = {tiles, tile_count, token_tiles, tile_tokens, group, row_tiles};                          \
    const Weight weight = {codes, scales, global_scale, blocks, chunks, parts, rows};                           \
    prefill<paired, __VA_ARGS__>(maps, work, weight, limit);                                                    \
  }

// By the largest tile. ptxas gives up on overlapping wgmma when the sizes of a kernel add up to more than about 640.
PRODUCT(sm90_nvfp4_prefill_plain_128, false, 32, 64, 96, 128)
PRODUCT(sm90_nvfp4_prefill_plain_160, false, 64, 96, 128, 160)
PRODUCT(sm90_nvfp4_prefill_plain_256, false, 128, 224, 256)
PRODUCT(sm90_nvfp4_prefill_paired_128, true, 32, 64, 96, 128)
PRODUCT(sm90_nvfp4_prefill_paired_160, true, 64, 96, 128, 160)
PRODUCT(sm90_nvfp4_prefill_paired_256, true, 128, 224, 256)
