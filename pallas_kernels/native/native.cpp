// Products on a processor with AVX-512 VNNI, as custom calls of XLA; made for few rows.
//
// At one token a product is bound by reading the weight, so the layouts below are read once, from
// front to back, by all threads. A panel is 64 output channels (4 registers of 16), and holds all
// input channels of them; a word is 32 bits of one output channel:
//
//     4 bits   [panels][in_ch / 8][64] words, code k + 8 in bits 4k .. 4k+3 for the 8 channels
//     8 bits   [panels][in_ch / 4][64] words, code k + 128 in byte k for the 4 channels
//
// Floats times 4 bits: a permutation of a register that holds the 16 possible values looks a code
// up by the low 4 bits of a word, so that 16 weights cost a shift, a permutation and a product.
// Integers: `vpdpbusd` multiplies unsigned bytes (the stored codes) by signed ones (activations).
// The offset of 8 or 128 and all zero points are taken out again with the sums of activations and
// of codes:   Σ (u − o − z)(x − zx) = Σ u·x − (o + z)(Σ x − n·zx) − zx·Σ u,   Σ u = Σ q + n·o.
//
// Threads take panels from a counter, so that one which the system has interrupted holds up nobody.
// A worker waits for the next call by spinning for a while, because waking it takes as long as a
// whole product of a small model.

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2")))

namespace {

constexpr int kRegisters = 4;
constexpr int kPanel = 16 * kRegisters;
constexpr int64_t kManyRows = 32;   // from which on a panel of floats is made first
constexpr int64_t kTaskRows = 256;  // that a panel of floats is made for; more balances threads less

// ---------------------------------------------------------------------------------------- threads

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: workers may outlive static objects
    return *pool;
  }

  int threads() const { return workers_ + 1; }

  // Calls task(i) for i in 0 .. n-1, shared out among the threads. When another call has the
  // workers, or they stayed behind in the process that forked this one, this one does all of it.
  template <typename Task>
  void run(int n, const Task& task) {
    std::unique_lock<std::mutex> mine(busy_, std::try_to_lock);
    if (n < 2 || n > kMaxTasks || !workers_ || !mine.owns_lock() || getpid() != owner_) {
      for (int i = 0; i < n; ++i) task(i);
      return;
    }
    call_ = [](const void* t, int i) { (*static_cast<const Task*>(t))(i); };
    task_ = &task;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t round = (state_.load(std::memory_order_relaxed) >> kRoundShift) + 1;
    state_.store(round << kRoundShift | uint64_t(n) << kTotalShift);
    if (sleeping_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work();
    for (int spin = 0; done_.load(std::memory_order_acquire) < n; ++spin) pause(spin);
  }

 private:
  // The state is one word, so that a worker that comes late can claim nothing of a call that is
  // over: the number of the call, its tasks, and how many of them have been claimed.
  static constexpr int kTotalShift = 20, kRoundShift = 40;
  static constexpr int kMaxTasks = (1 << 20) - 1;
  static constexpr int kSpins = 4000;  // pauses, about a hundred microseconds

  Pool() {
    cpu_set_t mask;
    int n = sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : 1;
    if (const char* wanted = std::getenv("JAXCOMP_NATIVE_THREADS")) n = std::atoi(wanted);
    workers_ = std::clamp(n, 1, 64) - 1;
    for (int i = 0; i < workers_; ++i) std::thread([this] { serve(); }).detach();
  }

  static void pause(int spin) { spin < kSpins ? _mm_pause() : static_cast<void>(sched_yield()); }

  static bool open(uint64_t state) {
    return (state & kMaxTasks) < (state >> kTotalShift & kMaxTasks);
  }

  void work() {
    for (uint64_t state = state_.load(); open(state);) {
      if (!state_.compare_exchange_weak(state, state + 1)) continue;
      call_(task_, static_cast<int>(state & kMaxTasks));  // valid: the call waits for this task
      done_.fetch_add(1, std::memory_order_release);
      state = state_.load();
    }
  }

  void serve() {
    for (;;) {
      for (int spin = 0; !open(state_.load()) && spin < kSpins; ++spin) _mm_pause();
      if (!open(state_.load())) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return open(state_.load()); });
        sleeping_.fetch_sub(1);
      }
      work();
    }
  }

  const pid_t owner_ = getpid();
  int workers_ = 0;
  std::mutex busy_, sleep_;
  std::condition_variable wake_;
  std::atomic<uint64_t> state_{0};
  std::atomic<int> done_{0}, sleeping_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* task_ = nullptr;
};

// ------------------------------------------------------------------------------- quantized weights

struct Grid {
  const float* scale;  // [groups][columns]
  const int32_t* zero;  // like scale, or null: the code of 0.0
  const int32_t* sums;  // like scale, or null: Σ q of each group
  int64_t groups, columns, group_size;
};

// y[m][64] of one panel and R rows; x is [R][in_ch]; x_sums is [R][groups].
template <int R, int kBits>
AVX512 void float_panel(const float* x, int64_t x_stride, const float* x_sums,
                        const uint32_t* panel, const Grid& g, int64_t column, float* y,
                        int64_t y_stride, int width) {
  constexpr int kPerWord = 32 / kBits;
  const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  alignas(64) float total[R][kPanel] = {};
  const uint32_t* word = panel;
  for (int64_t group = 0; group < g.groups; ++group) {
    __m512 sum[R][kRegisters];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kRegisters; ++c) sum[r][c] = _mm512_setzero_ps();
    const float* xs = x + group * g.group_size;
    for (int64_t k = 0; k < g.group_size; k += kPerWord, word += kPanel) {
      __m512i words[kRegisters];
      for (int c = 0; c < kRegisters; ++c) words[c] = _mm512_loadu_si512(word + 16 * c);
      for (int j = 0; j < kPerWord; ++j) {
        for (int c = 0; c < kRegisters; ++c) {
          __m512 w;
          if constexpr (kBits == 4) {
            w = _mm512_permutexvar_ps(words[c], values);
            words[c] = _mm512_srli_epi32(words[c], 4);
          } else {
            w = _mm512_cvtepi32_ps(_mm512_and_si512(words[c], _mm512_set1_epi32(255)));
            w = _mm512_sub_ps(w, _mm512_set1_ps(128));
            words[c] = _mm512_srli_epi32(words[c], 8);
          }
          for (int r = 0; r < R; ++r) {
            sum[r][c] = _mm512_fmadd_ps(w, _mm512_set1_ps(xs[r * x_stride + k + j]), sum[r][c]);
          }
        }
      }
    }
    const float* scale = g.scale + group * g.columns + column;
    const int32_t* zero = g.zero ? g.zero + group * g.columns + column : nullptr;
    for (int c = 0; c < kRegisters; ++c) {
      const __m512 s = _mm512_loadu_ps(scale + 16 * c);
      for (int r = 0; r < R; ++r) {
        __m512 v = sum[r][c];
        if (zero) {
          const __m512 z = _mm512_cvtepi32_ps(_mm512_loadu_si512(zero + 16 * c));
          v = _mm512_fnmadd_ps(z, _mm512_set1_ps(x_sums[r * g.groups + group]), v);
        }
        const __m512 old = _mm512_load_ps(&total[r][16 * c]);
        _mm512_store_ps(&total[r][16 * c], _mm512_fmadd_ps(v, s, old));
      }
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(y + r * y_stride, total[r], sizeof(float) * width);
}

// The same for many rows: the panel becomes floats once, [in_ch][64] in `w`.
template <int kBits>
AVX512 void unpack_panel(const uint32_t* panel, const Grid& g, int64_t column, float* w) {
  constexpr int kPerWord = 32 / kBits;
  const __m512i mask = _mm512_set1_epi32((1 << kBits) - 1);
  const __m512i offset = _mm512_set1_epi32(1 << (kBits - 1));
  for (int64_t group = 0; group < g.groups; ++group) {
    const int64_t at = group * g.columns + column;
    for (int64_t k = 0; k < g.group_size; k += kPerWord, panel += kPanel) {
      for (int c = 0; c < kRegisters; ++c) {
        const __m512 scale = _mm512_loadu_ps(g.scale + at + 16 * c);
        __m512i zero = offset;
        if (g.zero) zero = _mm512_add_epi32(zero, _mm512_loadu_si512(g.zero + at + 16 * c));
        __m512i word = _mm512_loadu_si512(panel + 16 * c);
        float* to = w + (group * g.group_size + k) * kPanel + 16 * c;
        for (int j = 0; j < kPerWord; ++j, to += kPanel) {
          const __m512i q = _mm512_sub_epi32(_mm512_and_si512(word, mask), zero);
          _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_cvtepi32_ps(q), scale));
          word = _mm512_srli_epi32(word, kBits);
        }
      }
    }
  }
}

template <int R>
AVX512 void store_panel(const __m512 (&sum)[R][kRegisters], float* y, int64_t y_stride, int width) {
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRegisters; ++c) {
      const int left = std::clamp(width - 16 * c, 0, 16);
      _mm512_mask_storeu_ps(y + r * y_stride + 16 * c, static_cast<__mmask16>((1u << left) - 1),
                            sum[r][c]);
    }
}

// R rows of n numbers times n rows of 64.
template <int R>
AVX512 void unpacked_panel(const float* x, int64_t x_stride, int64_t n, const float* w,
                           int64_t w_stride, float* y, int64_t y_stride, int width) {
  __m512 sum[R][kRegisters];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRegisters; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t k = 0; k < n; ++k, w += w_stride) {
    __m512 row[kRegisters];
    for (int c = 0; c < kRegisters; ++c) row[c] = _mm512_loadu_ps(w + 16 * c);
    for (int r = 0; r < R; ++r) {
      const __m512 v = _mm512_set1_ps(x[r * x_stride + k]);
      for (int c = 0; c < kRegisters; ++c) sum[r][c] = _mm512_fmadd_ps(row[c], v, sum[r][c]);
    }
  }
  store_panel<R>(sum, y, y_stride, width);
}

// As above with codes; `x` is [R][in_ch] in the order that `arrange` gives; x_scale, x_zero are
// [R]; x_sums is [R][groups] of int32.
template <int R, int kBits>
AVX512 void integer_panel(const int8_t* x, int64_t x_stride, const int32_t* x_sums,
                          const float* x_scale, const int32_t* x_zero, const uint32_t* panel,
                          const Grid& g, int64_t column, float* y, int64_t y_stride, int width) {
  constexpr int kPerWord = 32 / kBits;
  constexpr int kOffset = kBits == 4 ? 8 : 128;
  const __m512i nibbles = _mm512_set1_epi8(15);
  alignas(64) float total[R][kPanel] = {};
  const uint32_t* word = panel;
  for (int64_t group = 0; group < g.groups; ++group) {
    __m512i sum[R][kRegisters];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kRegisters; ++c) sum[r][c] = _mm512_setzero_si512();
    const int8_t* xs = x + group * g.group_size;
    for (int64_t k = 0; k < g.group_size; k += kPerWord, word += kPanel) {
      __m512i words[kRegisters];
      for (int c = 0; c < kRegisters; ++c) words[c] = _mm512_loadu_si512(word + 16 * c);
      for (int r = 0; r < R; ++r) {
        int32_t four[2];
        std::memcpy(four, xs + r * x_stride + k, kBits == 4 ? 8 : 4);
        for (int c = 0; c < kRegisters; ++c) {
          if constexpr (kBits == 4) {
            const __m512i low = _mm512_and_si512(words[c], nibbles);
            const __m512i high = _mm512_and_si512(_mm512_srli_epi32(words[c], 4), nibbles);
            sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], low, _mm512_set1_epi32(four[0]));
            sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], high, _mm512_set1_epi32(four[1]));
          } else {
            sum[r][c] = _mm512_dpbusd_epi32(sum[r][c], words[c], _mm512_set1_epi32(four[0]));
          }
        }
      }
    }
    const float* scale = g.scale + group * g.columns + column;
    const int32_t n = static_cast<int32_t>(g.group_size);
    for (int c = 0; c < kRegisters; ++c) {
      const __m512 s = _mm512_loadu_ps(scale + 16 * c);
      __m512i shift = _mm512_set1_epi32(kOffset);
      if (g.zero) {
        const int32_t* zero = g.zero + group * g.columns + column;
        shift = _mm512_add_epi32(shift, _mm512_loadu_si512(zero + 16 * c));
      }
      for (int r = 0; r < R; ++r) {
        const int32_t zx = x_zero ? x_zero[r] : 0;
        const int32_t x_sum = x_sums[r * g.groups + group] - n * zx;
        __m512i v = _mm512_sub_epi32(sum[r][c], _mm512_mullo_epi32(shift, _mm512_set1_epi32(x_sum)));
        if (zx) {
          const int32_t* sums = g.sums + group * g.columns + column;
          __m512i u = _mm512_loadu_si512(sums + 16 * c);
          u = _mm512_add_epi32(u, _mm512_set1_epi32(n * kOffset));
          v = _mm512_sub_epi32(v, _mm512_mullo_epi32(u, _mm512_set1_epi32(zx)));
        }
        const __m512 old = _mm512_load_ps(&total[r][16 * c]);
        const __m512 new_total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(v), s, old);
        _mm512_store_ps(&total[r][16 * c], new_total);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const __m512 a = _mm512_set1_ps(x_scale[r]);
    for (int c = 0; c < kPanel; c += 16) {
      _mm512_store_ps(&total[r][c], _mm512_mul_ps(_mm512_load_ps(&total[r][c]), a));
    }
    std::memcpy(y + r * y_stride, total[r], sizeof(float) * width);
  }
}

// Rows of a task where each is of one panel and of some of the rows: all about alike, for threads.
int64_t task_rows(int64_t rows) {
  const int64_t parts = (rows + kTaskRows - 1) / kTaskRows, part = (rows + parts - 1) / parts;
  return (part + 5) / 6 * 6;  // the rows that a kernel takes at once
}

// Calls f<R> with the largest R ≤ rows for which there is a kernel; gives R.
#define ROWS(R_MAX, rows, CALL)             \
  ((rows) >= 6 && R_MAX >= 6   ? (CALL(6), 6) \
   : (rows) >= 4               ? (CALL(4), 4) \
   : (rows) >= 2               ? (CALL(2), 2) \
                               : (CALL(1), 1))

AVX512 void panel_rows(const float* x, int64_t x_stride, int64_t rows, int64_t n, const float* w,
                       int64_t w_stride, float* y, int64_t y_stride, int width) {
  for (int64_t r = 0; r < rows;) {
#define CALL(R) \
  unpacked_panel<R>(x + r * x_stride, x_stride, n, w, w_stride, y + r * y_stride, y_stride, width)
    r += ROWS(6, rows - r, CALL);
#undef CALL
  }
}

// x · w for many rows; panel_of(column, room) gives a panel of floats, [in_ch][64], of the weight,
// perhaps in the room for one that it gets.
template <typename PanelOf>
void many_rows(const float* x, int64_t rows, int64_t in_ch, int64_t out_ch, float* y,
               const PanelOf& panel_of) {
  const int64_t panels = (out_ch + kPanel - 1) / kPanel, part = task_rows(rows);
  Pool::get().run(static_cast<int>(panels * ((rows + part - 1) / part)), [&](int task) {
    thread_local std::vector<float> room;
    room.resize(in_ch * kPanel);
    const int64_t column = task % panels * kPanel, first = task / panels * part;
    const int64_t last = std::min(first + part, rows);
    const int width = static_cast<int>(std::min<int64_t>(kPanel, out_ch - column));
    const float* w = panel_of(column, room.data());
    panel_rows(x + first * in_ch, in_ch, last - first, in_ch, w, kPanel,
               y + first * out_ch + column, out_ch, width);
  });
}

template <int kBits>
void float_product(const float* x, int64_t rows, int64_t in_ch, const uint32_t* panels,
                   const Grid& g, int64_t out_ch, float* y) {
  const int64_t words = in_ch * kBits / 32 * kPanel;
  if (rows >= kManyRows) {
    many_rows(x, rows, in_ch, out_ch, y, [&](int64_t column, float* room) {
      unpack_panel<kBits>(panels + column / kPanel * words, g, column, room);
      return room;
    });
    return;
  }
  std::vector<float> sums;
  if (g.zero) {
    sums.resize(rows * g.groups);
    for (int64_t i = 0; i < rows * g.groups; ++i) {
      const float* part = x + i * g.group_size;  // rows are whole groups
      float sum = 0;
      for (int64_t k = 0; k < g.group_size; ++k) sum += part[k];
      sums[i] = sum;
    }
  }
  Pool::get().run(static_cast<int>(g.columns / kPanel), [&](int p) {
    const int64_t column = int64_t{p} * kPanel;
    const int width = static_cast<int>(std::min<int64_t>(kPanel, out_ch - column));
    for (int64_t r = 0; r < rows;) {
#define CALL(R)                                                                             \
  float_panel<R, kBits>(x + r * in_ch, in_ch, sums.data() + (g.zero ? r * g.groups : 0),    \
                        panels + p * words, g, column, y + r * out_ch + column, out_ch, width)
      r += ROWS(4, rows - r, CALL);
#undef CALL
    }
  });
}

template <int kBits>
void integer_product(const int8_t* x, int64_t rows, int64_t in_ch, const float* x_scale,
                     const int32_t* x_zero, const uint32_t* panels, const Grid& g, int64_t out_ch,
                     float* y) {
  std::vector<int32_t> sums(rows * g.groups);
  std::vector<int8_t> arranged;
  for (int64_t i = 0; i < rows * g.groups; ++i) {
    int32_t sum = 0;
    for (int64_t k = 0; k < g.group_size; ++k) sum += x[i * g.group_size + k];
    sums[i] = sum;
  }
  if (kBits == 4) {  // of 8 channels first the even ones, which lie in the low nibbles
    arranged.resize(rows * in_ch);
    for (int64_t i = 0; i < rows * in_ch; i += 8)
      for (int j = 0; j < 4; ++j) {
        arranged[i + j] = x[i + 2 * j];
        arranged[i + 4 + j] = x[i + 2 * j + 1];
      }
    x = arranged.data();
  }
  const int64_t words = in_ch * kBits / 32 * kPanel;
  Pool::get().run(static_cast<int>(g.columns / kPanel), [&](int p) {
    const int64_t column = int64_t{p} * kPanel;
    const int width = static_cast<int>(std::min<int64_t>(kPanel, out_ch - column));
    for (int64_t r = 0; r < rows;) {
#define CALL(R)                                                                             \
  integer_panel<R, kBits>(x + r * in_ch, in_ch, sums.data() + r * g.groups, x_scale + r,    \
                          x_zero ? x_zero + r : nullptr, panels + p * words, g, column,     \
                          y + r * out_ch + column, out_ch, width)
      r += ROWS(6, rows - r, CALL);
#undef CALL
    }
  });
}

template <typename T>
const T* data_or_null(const ffi::AnyBuffer& b) {
  return b.element_count() ? static_cast<const T*>(b.untyped_data()) : nullptr;
}

Grid grid_of(const ffi::Buffer<ffi::F32>& scale, const ffi::AnyBuffer& zero,
             const ffi::AnyBuffer& sums, int64_t in_ch) {
  const int64_t groups = scale.dimensions()[0], columns = scale.dimensions()[1];
  return {scale.typed_data(), data_or_null<int32_t>(zero), data_or_null<int32_t>(sums),
          groups, columns, in_ch / groups};
}

ffi::Error FloatProduct(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> panels,
                        ffi::Buffer<ffi::F32> scale, ffi::AnyBuffer zero, int64_t bits,
                        ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], in_ch = x.dimensions()[1];
  const Grid g = grid_of(scale, zero, zero, in_ch);
  auto* f = bits == 4 ? float_product<4> : float_product<8>;
  f(x.typed_data(), rows, in_ch, panels.typed_data(), g, y->dimensions()[1], y->typed_data());
  return ffi::Error::Success();
}

ffi::Error IntegerProduct(ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> x_scale,
                          ffi::AnyBuffer x_zero, ffi::Buffer<ffi::U32> panels,
                          ffi::Buffer<ffi::F32> scale, ffi::AnyBuffer zero, ffi::AnyBuffer sums,
                          int64_t bits, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], in_ch = x.dimensions()[1];
  const Grid g = grid_of(scale, zero, sums, in_ch);
  auto* f = bits == 4 ? integer_product<4> : integer_product<8>;
  f(x.typed_data(), rows, in_ch, x_scale.typed_data(), data_or_null<int32_t>(x_zero),
    panels.typed_data(), g, y->dimensions()[1], y->typed_data());
  return ffi::Error::Success();
}

// ----------------------------------------------------------------------------------- dense weights

// In panels like codes, [panels][in_ch][64], so that a product reads each of them front to back.

template <typename T>
AVX512 inline __m512 load(const T* p);

template <>
AVX512 inline __m512 load(const float* p) {
  return _mm512_loadu_ps(p);
}

template <>
AVX512 inline __m512 load(const uint16_t* p) {  // bfloat16
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

constexpr int64_t kFewRows = 4;        // up to which a product is bound by reading the panels
constexpr int64_t kAhead = 8 * kPanel;  // elements

template <int R, typename T>
AVX512 void dense_rows(const float* x, int64_t in_ch, const T* w, float* y, int64_t y_stride,
                       int width) {
  __m512 sum[R][kRegisters];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < kRegisters; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t k = 0; k < in_ch; ++k, w += kPanel)
    for (int c = 0; c < kRegisters; ++c) {
      if (c % (64 / (16 * sizeof(T))) == 0) _mm_prefetch(w + kAhead + 16 * c, _MM_HINT_T0);
      const __m512 v = load(w + 16 * c);
      for (int r = 0; r < R; ++r)
        sum[r][c] = _mm512_fmadd_ps(v, _mm512_set1_ps(x[r * in_ch + k]), sum[r][c]);
    }
  store_panel<R>(sum, y, y_stride, width);
}

AVX512 const float* as_floats(const uint16_t* panel, int64_t size, float* to) {
  for (int64_t i = 0; i < size; i += 16) _mm512_storeu_ps(to + i, load(panel + i));
  return to;
}

const float* as_floats(const float* panel, int64_t, float*) { return panel; }

template <typename T>
void dense_product(const float* x, int64_t rows, int64_t in_ch, const T* w, int64_t out_ch,
                   float* y) {
  const int64_t size = in_ch * kPanel;
  if (rows > kFewRows) {
    many_rows(x, rows, in_ch, out_ch, y, [&](int64_t column, float* room) {
      return as_floats(w + column / kPanel * size, size, room);
    });
    return;
  }
  Pool::get().run(static_cast<int>((out_ch + kPanel - 1) / kPanel), [&](int p) {
    const int64_t column = int64_t{p} * kPanel;
    const int width = static_cast<int>(std::min<int64_t>(kPanel, out_ch - column));
    for (int64_t r = 0; r < rows;) {
#define CALL(R) \
  dense_rows<R, T>(x + r * in_ch, in_ch, w + p * size, y + r * out_ch + column, out_ch, width)
      r += ROWS(4, rows - r, CALL);
#undef CALL
    }
  });
}

ffi::Error DenseProduct(ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], in_ch = x.dimensions()[1], out_ch = y->dimensions()[1];
  if (w.element_type() == ffi::DataType::F32) {
    dense_product(x.typed_data(), rows, in_ch, static_cast<const float*>(w.untyped_data()), out_ch,
                  y->typed_data());
  } else if (w.element_type() == ffi::DataType::BF16) {
    dense_product(x.typed_data(), rows, in_ch, static_cast<const uint16_t*>(w.untyped_data()),
                  out_ch, y->typed_data());
  } else {
    return ffi::Error::InvalidArgument("a dense weight is float32 or bfloat16");
  }
  return ffi::Error::Success();
}

// ------------------------------------------------------------------------------------ activations

// Codes of each row on its own grid, which `pallas_kernels.grid` defines; operation by operation as
// XLA executes it, which divides by a constant by multiplying with the reciprocal.
AVX512 void quantize_row(const float* x, int64_t n, float c_low, float c_high, int qmax,
                         bool symmetric, float min_scale, int8_t* codes, float* scale,
                         int8_t* zero) {
  __m512 low = _mm512_set1_ps(x[0]), high = low;
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(n - k, 16)) - 1);
    low = _mm512_mask_min_ps(low, mask, low, _mm512_maskz_loadu_ps(mask, x + k));
    high = _mm512_mask_max_ps(high, mask, high, _mm512_maskz_loadu_ps(mask, x + k));
  }
  float least = _mm512_reduce_min_ps(low) * c_low, greatest = _mm512_reduce_max_ps(high) * c_high;
  float step, z = 0;
  if (symmetric) {
    step = std::max(std::max(std::fabs(least), std::fabs(greatest)) * (1.0f / qmax), min_scale);
  } else {
    least = std::min(least, 0.0f);
    greatest = std::max(greatest, 0.0f);
    step = std::max((greatest - least) * (1.0f / (2 * qmax + 1)), min_scale);
    z = std::nearbyint(-least / step) - qmax - 1;
    z = std::clamp<float>(z, -qmax - 1, qmax);
    *zero = static_cast<int8_t>(z);
  }
  *scale = step;
  const __m512 divisor = _mm512_set1_ps(step), shift = _mm512_set1_ps(z);
  const __m512 bottom = _mm512_set1_ps(-qmax - 1), top = _mm512_set1_ps(qmax);
  for (int64_t k = 0; k < n; k += 16) {
    const __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(n - k, 16)) - 1);
    __m512 q = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + k), divisor);
    q = _mm512_roundscale_ps(q, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    q = _mm512_min_ps(_mm512_max_ps(_mm512_add_ps(q, shift), bottom), top);
    _mm512_mask_cvtepi32_storeu_epi8(codes + k, mask, _mm512_cvtps_epi32(q));
  }
}

ffi::Error Quantize(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::F32> clip, int64_t bits,
                    bool symmetric, float min_scale, ffi::ResultBuffer<ffi::S8> codes,
                    ffi::ResultBuffer<ffi::F32> scale, ffi::ResultBuffer<ffi::S8> zero) {
  const int64_t rows = x.dimensions()[0], n = x.dimensions()[1];
  for (int64_t r = 0; r < rows; ++r) {
    quantize_row(x.typed_data() + r * n, n, clip.typed_data()[0], clip.typed_data()[1],
                 (1 << (bits - 1)) - 1, symmetric, min_scale, codes->typed_data() + r * n,
                 scale->typed_data() + r, symmetric ? nullptr : zero->typed_data() + r);
  }
  return ffi::Error::Success();
}

// -------------------------------------------------------------------------------------- attention

// Rows of a cache, 16 numbers at a time. 4-bit codes come apart into those of the low nibbles and
// those of the high ones, so queries and outputs are put into that order: `place` says which
// channel is lane i of the row as it is read.
template <typename T>
struct FloatRows {
  const T* data;
  int64_t dim;
  AVX512 __m512 read(int64_t row, int64_t c) const { return load(data + row * dim + c); }
  static int64_t place(int64_t i) { return i; }
};

struct ByteRows {
  const uint8_t* data;
  int64_t dim;
  AVX512 __m512 read(int64_t row, int64_t c) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + row * dim + c));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  static int64_t place(int64_t i) { return i; }
};

struct NibbleRows {
  const uint8_t* data;
  int64_t dim;
  AVX512 __m512 read(int64_t row, int64_t c) const {
    const uint8_t* at = data + row * (dim / 2) + c / 32 * 16;
    __m512i word = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    word = _mm512_slli_epi32(word, c % 32 ? 24 : 28);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(word, 28));
  }
  static int64_t place(int64_t i) { return i / 32 * 32 + 2 * (i % 16) + (i % 32) / 16; }
};

AVX512 inline __m512 exp_ps(__m512 x) {  // for x ≤ 0; relative error below 2e-7
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f,
                  1.0f, 1.0f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(p, n);
}

struct RowGrid {  // of the rows of one head; null where rows are floats, or symmetric
  const float* scale;
  const int8_t* zero;
};

constexpr int kSlots = 256;  // of a cache that one task looks at
constexpr int kMaxDim = 256;

// Slots [first, last) of one head and G queries: the highest score, Σ exp and Σ exp · v, with v in
// the order in which its rows are read.
template <int G, typename K, typename V>
AVX512 void attend(const float* q, const K& k, const RowGrid& kg, const V& v, const RowGrid& vg,
                   int64_t dim, int64_t first, int64_t last, float* highest, float* total,
                   float* out) {
  alignas(64) float score[G][kSlots];
  float q_sum[G];
  for (int g = 0; g < G; ++g) {
    q_sum[g] = 0;
    for (int64_t c = 0; c < dim; ++c) q_sum[g] += q[g * dim + c];
  }
  const int64_t n = last - first;
  for (int64_t s = 0; s < n; ++s) {
    __m512 sum[G];
    for (int g = 0; g < G; ++g) sum[g] = _mm512_setzero_ps();
    for (int64_t c = 0; c < dim; c += 16) {
      const __m512 row = k.read(first + s, c);
      for (int g = 0; g < G; ++g)
        sum[g] = _mm512_fmadd_ps(row, _mm512_loadu_ps(q + g * dim + c), sum[g]);
    }
    const float z = kg.zero ? kg.zero[first + s] : 0.0f;
    const float step = kg.scale ? kg.scale[first + s] : 1.0f;
    for (int g = 0; g < G; ++g)
      score[g][s] = (_mm512_reduce_add_ps(sum[g]) - z * q_sum[g]) * step;
  }
  float shift[G];
  for (int g = 0; g < G; ++g) {
    highest[g] = *std::max_element(score[g], score[g] + n);
    total[g] = shift[g] = 0;
    for (int64_t s = 0; s < n; s += 16) {
      const __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(n - s, 16)) - 1);
      const __m512 x = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, score[g] + s),
                                     _mm512_set1_ps(highest[g]));
      const __m512 p = _mm512_maskz_mov_ps(mask, exp_ps(x));
      _mm512_mask_storeu_ps(score[g] + s, mask, p);
      total[g] += _mm512_reduce_add_ps(p);
    }
    for (int64_t s = 0; vg.scale && s < n; ++s) {
      score[g][s] *= vg.scale[first + s];
      if (vg.zero) shift[g] += score[g][s] * vg.zero[first + s];
    }
  }
  for (int64_t c = 0; c < dim; c += 16) {
    __m512 sum[G];
    for (int g = 0; g < G; ++g) sum[g] = _mm512_set1_ps(-shift[g]);
    for (int64_t s = 0; s < n; ++s) {
      const __m512 row = v.read(first + s, c);
      for (int g = 0; g < G; ++g)
        sum[g] = _mm512_fmadd_ps(row, _mm512_set1_ps(score[g][s]), sum[g]);
    }
    for (int g = 0; g < G; ++g) _mm512_storeu_ps(out + g * dim + c, sum[g]);
  }
}

template <typename K, typename V>
void attend_group(int group, const float* q, const K& k, const RowGrid& kg, const V& v,
                  const RowGrid& vg, int64_t dim, int64_t first, int64_t last, float* highest,
                  float* total, float* out) {
  for (int g = 0; g < group;) {
#define CALL(G)                                                                           \
  attend<G>(q + g * dim, k, kg, v, vg, dim, first, last, highest + g, total + g, out + g * dim)
    switch (std::min(group - g, 4)) {
      case 1: CALL(1); g += 1; break;
      case 2: CALL(2); g += 2; break;
      case 3: CALL(3); g += 3; break;
      default: CALL(4); g += 4;
    }
#undef CALL
  }
}

struct Attention {
  int64_t batch, heads, group, slots, dim;
  const float* q;
  const int32_t *starts, *stops;
  const float *k_scale, *v_scale;
  const int8_t *k_zero, *v_zero;
  float scale;
  float* out;
};

template <typename K, typename V, typename KData, typename VData>
void attention(const Attention& a, const KData* k, int64_t k_row, const VData* v, int64_t v_row) {
  const int64_t chunks = (a.slots + kSlots - 1) / kSlots, queries = a.batch * a.heads * a.group;
  // Of each chunk: [chunks][queries] highest, total; [chunks][queries][dim] outputs.
  std::vector<float> arranged(queries * a.dim), highest(chunks * queries, -INFINITY),
      total(chunks * queries), out(chunks * queries * a.dim);
  for (int64_t i = 0; i < queries; ++i)
    for (int64_t c = 0; c < a.dim; ++c)
      arranged[i * a.dim + c] = a.q[i * a.dim + K::place(c)] * a.scale;
  Pool::get().run(static_cast<int>(a.batch * a.heads * chunks), [&](int task) {
    const int64_t chunk = task % chunks, head = task / chunks, b = head / a.heads;
    const int64_t first = std::max<int64_t>(a.starts[b], chunk * kSlots);
    const int64_t last = std::min({int64_t{a.stops[b]}, (chunk + 1) * kSlots, a.slots});
    if (first >= last) return;
    const int64_t row = head * a.slots, i = chunk * queries + head * a.group;
    auto at = [&](auto* p) { return p ? p + row : nullptr; };
    attend_group(static_cast<int>(a.group), arranged.data() + head * a.group * a.dim,
                 K{k + row * k_row, a.dim}, RowGrid{at(a.k_scale), at(a.k_zero)},
                 V{v + row * v_row, a.dim}, RowGrid{at(a.v_scale), at(a.v_zero)}, a.dim, first,
                 last, &highest[i], &total[i], &out[i * a.dim]);
  });
  for (int64_t i = 0; i < queries; ++i) {
    float top = -INFINITY, sum = 0;
    for (int64_t c = 0; c < chunks; ++c) top = std::max(top, highest[c * queries + i]);
    alignas(64) float y[kMaxDim] = {};
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * queries + i;
      if (highest[at] == -INFINITY) continue;
      const float weight = std::exp(highest[at] - top);
      sum += weight * total[at];
      for (int64_t d = 0; d < a.dim; ++d) y[d] += weight * out[at * a.dim + d];
    }
    for (int64_t d = 0; d < a.dim; ++d) {
      a.out[i * a.dim + V::place(d)] = sum > 0 ? y[d] / sum : 0.0f;
    }
  }
}

template <typename K, typename KData>
ffi::Error attention_with(const Attention& a, const KData* k, int64_t k_row,
                          const ffi::AnyBuffer& v, int64_t v_bits) {
  const void* data = v.untyped_data();
  if (v.element_type() == ffi::DataType::F32) {
    attention<K, FloatRows<float>>(a, k, k_row, static_cast<const float*>(data), a.dim);
  } else if (v.element_type() == ffi::DataType::BF16) {
    attention<K, FloatRows<uint16_t>>(a, k, k_row, static_cast<const uint16_t*>(data), a.dim);
  } else if (v_bits == 8) {
    attention<K, ByteRows>(a, k, k_row, static_cast<const uint8_t*>(data), a.dim);
  } else {
    attention<K, NibbleRows>(a, k, k_row, static_cast<const uint8_t*>(data), a.dim / 2);
  }
  return ffi::Error::Success();
}

ffi::Error DecodeAttention(ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                           ffi::Buffer<ffi::S32> starts, ffi::Buffer<ffi::S32> stops,
                           ffi::AnyBuffer k_scale, ffi::AnyBuffer k_zero, ffi::AnyBuffer v_scale,
                           ffi::AnyBuffer v_zero, float scale, int64_t k_bits, int64_t v_bits,
                           ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = q.dimensions();
  const Attention a{shape[0], shape[1], shape[2], k.dimensions()[2], shape[3], q.typed_data(),
                    starts.typed_data(), stops.typed_data(), data_or_null<float>(k_scale),
                    data_or_null<float>(v_scale), data_or_null<int8_t>(k_zero),
                    data_or_null<int8_t>(v_zero), scale, y->typed_data()};
  if (a.dim > kMaxDim) return ffi::Error::InvalidArgument("head_dim above 256");
  const void* data = k.untyped_data();
  if (k.element_type() == ffi::DataType::F32) {
    return attention_with<FloatRows<float>>(a, static_cast<const float*>(data), a.dim, v, v_bits);
  }
  if (k.element_type() == ffi::DataType::BF16) {
    return attention_with<FloatRows<uint16_t>>(a, static_cast<const uint16_t*>(data), a.dim, v,
                                               v_bits);
  }
  const uint8_t* codes = static_cast<const uint8_t*>(data);
  if (k_bits == 8) return attention_with<ByteRows>(a, codes, a.dim, v, v_bits);
  return attention_with<NibbleRows>(a, codes, a.dim / 2, v, v_bits);
}

// ---------------------------------------------------------------------------------------- prefill

constexpr int64_t kQueries = 48;  // of a task; whole sixes, which a kernel takes at once
constexpr int64_t kKeys = 512;    // whose scores exist at once; whole panels

struct Prefill {
  int64_t time, heads, kv_heads, slots, dim;
  int64_t slot;    // of the first query
  int64_t window;  // slots that a query sees at most, its own included; 0 for all
  float scale;
  const float *q, *k, *v;
  const int32_t* starts;
  float* out;

  int64_t end() const { return slot + time; }
  int64_t panels() const { return (end() + kPanel - 1) / kPanel; }
  int64_t wide() const { return (dim + kPanel - 1) / kPanel * kPanel; }
  // The first slot that query i of sequence b sees; the last one is its own.
  int64_t low(int64_t b, int64_t i) const {
    return std::max<int64_t>({0, starts[b], window ? slot + i + 1 - window : 0});
  }
};

// 64 slots of one kv head: keys as [dim][64], values as [64][wide]. What no query sees is zero.
void arrange_slots(const Prefill& a, int64_t b, int64_t head, int64_t panel, float* keys,
                   float* values) {
  const int64_t wide = a.wide(), dim = a.dim;
  for (int64_t j = 0; j < kPanel; ++j) {
    const int64_t s = panel * kPanel + j;
    const bool seen = s >= a.starts[b] && s < a.end();
    const int64_t row = (head * a.slots + s) * dim;
    for (int64_t d = 0; d < dim; ++d) keys[d * kPanel + j] = seen ? a.k[row + d] : 0.0f;
    for (int64_t d = 0; d < wide; ++d)
      values[j * wide + d] = seen && d < dim ? a.v[row + d] : 0.0f;
  }
}

inline __mmask16 lanes(int64_t at, int64_t first, int64_t last) {
  const auto below = [&](int64_t n) { return (1u << std::clamp<int64_t>(n - at, 0, 16)) - 1; };
  return static_cast<__mmask16>(below(last) & ~below(first));
}

// Scores [first, last) of a row become exp(score − highest), all others 0; `highest` and `total` go
// on, and the factor for what was summed before comes back.
AVX512 float soften(float* score, int64_t first, int64_t last, int64_t n, float& highest,
                    float& total) {
  __m512 most = _mm512_set1_ps(highest);
  for (int64_t s = first / 16 * 16; s < last; s += 16)
    most = _mm512_mask_max_ps(most, lanes(s, first, last), most, _mm512_loadu_ps(score + s));
  const float old = highest;
  highest = _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(highest);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t s = 0; s < n; s += 16) {
    __m512 p = _mm512_setzero_ps();
    if (const __mmask16 seen = lanes(s, first, last))
      p = _mm512_maskz_mov_ps(seen, exp_ps(_mm512_sub_ps(_mm512_loadu_ps(score + s), shift)));
    _mm512_storeu_ps(score + s, p);
    sum = _mm512_add_ps(sum, p);
  }
  const float factor = std::exp(old - highest);
  total = total * factor + _mm512_reduce_add_ps(sum);
  return factor;
}

// Queries [first, last) of one head of a sequence; keys and values as `arrange_slots` gives them.
AVX512 void attend_queries(const Prefill& a, int64_t b, int64_t head, int64_t first, int64_t last,
                           const float* keys, const float* values) {
  thread_local std::vector<float> queries, scores, part, sums;
  const int64_t rows = last - first, dim = a.dim, wide = a.wide(), stride = a.heads * dim;
  const float* from = a.q + (b * a.time + first) * stride + head * dim;
  float* to = a.out + (b * a.time + first) * stride + head * dim;
  queries.resize(kQueries * dim);
  scores.resize(kQueries * kKeys);
  part.resize(kQueries * wide);
  sums.assign(kQueries * wide, 0.0f);
  float highest[kQueries], total[kQueries];
  for (int64_t r = 0; r < rows; ++r) {
    highest[r] = -1e30f;
    total[r] = 0;
    for (int64_t d = 0; d < dim; ++d) queries[r * dim + d] = from[r * stride + d] * a.scale;
  }
  const int64_t end = a.slot + last;
  for (int64_t base = a.low(b, first) / kPanel * kPanel; base < end; base += kKeys) {
    const int64_t n = std::min(kKeys, end - base);
    for (int64_t c = 0; c < n; c += kPanel)
      panel_rows(queries.data(), dim, rows, dim, keys + (base + c) * dim, kPanel,
                 scores.data() + c, kKeys, kPanel);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t low = std::max<int64_t>(a.low(b, first + r) - base, 0);
      const int64_t high = std::min(a.slot + first + r + 1 - base, n);
      const int64_t whole = (n + 15) / 16 * 16;
      float* row = scores.data() + r * kKeys;
      if (low >= high) {
        std::fill(row, row + whole, 0.0f);
        continue;
      }
      const float factor = soften(row, low, high, whole, highest[r], total[r]);
      for (int64_t d = 0; d < wide; ++d) sums[r * wide + d] *= factor;
    }
    for (int64_t c = 0; c < wide; c += kPanel)
      panel_rows(scores.data(), kKeys, rows, n, values + base * wide + c, wide, part.data() + c,
                 wide, kPanel);
    for (int64_t i = 0; i < rows * wide; ++i) sums[i] += part[i];
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float scale = total[r] == 0 ? 0.0f : 1 / total[r];  // a query in padding sees nothing
    for (int64_t d = 0; d < dim; ++d) to[r * stride + d] = sums[r * wide + d] * scale;
  }
}

ffi::Error PrefillAttention(ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                            ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> starts,
                            ffi::Buffer<ffi::S32> slot, float scale, int64_t window,
                            ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = q.dimensions(), cache = k.dimensions();
  const Prefill a{shape[1], shape[2], cache[1], cache[2], shape[3], slot.typed_data()[0], window,
                  scale, q.typed_data(), k.typed_data(), v.typed_data(), starts.typed_data(),
                  y->typed_data()};
  const int64_t batch = shape[0], panels = a.panels(), size = panels * kPanel;
  const int64_t kv_rows = batch * a.kv_heads, key_size = size * a.dim, value_size = size * a.wide();
  const std::unique_ptr<float[]> keys(new float[kv_rows * key_size]);
  const std::unique_ptr<float[]> values(new float[kv_rows * value_size]);
  Pool::get().run(static_cast<int>(kv_rows * panels), [&](int task) {
    const int64_t row = task / panels, panel = task % panels;
    arrange_slots(a, row / a.kv_heads, row, panel,
                  keys.get() + row * key_size + panel * kPanel * a.dim,
                  values.get() + row * value_size + panel * kPanel * a.wide());
  });
  const int64_t tiles = (a.time + kQueries - 1) / kQueries;
  Pool::get().run(static_cast<int>(batch * a.heads * tiles), [&](int task) {
    const int64_t tile = tiles - 1 - task / (batch * a.heads);  // the longest first
    const int64_t b = task % (batch * a.heads) / a.heads, head = task % a.heads;
    const int64_t row = b * a.kv_heads + head / (a.heads / a.kv_heads);
    attend_queries(a, b, head, tile * kQueries, std::min((tile + 1) * kQueries, a.time),
                   keys.get() + row * key_size, values.get() + row * value_size);
  });
  return ffi::Error::Success();
}

}  // namespace

extern "C" int jaxcomp_native_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

extern "C" int jaxcomp_native_threads() { return Pool::get().threads(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_float_product, FloatProduct,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_integer_product, IntegerProduct,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_prefill_attention, PrefillAttention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_dense_product, DenseProduct,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_quantize, Quantize,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<bool>("symmetric")
                                  .Attr<float>("min_scale")
                                  .Ret<ffi::Buffer<ffi::S8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S8>>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxcomp_decode_attention, DecodeAttention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("k_bits")
                                  .Attr<int64_t>("v_bits")
                                  .Ret<ffi::Buffer<ffi::F32>>());
