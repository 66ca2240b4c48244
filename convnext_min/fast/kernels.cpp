// The parts of a ConvNeXt block around its two matrix products, each in one pass over the memory, and, for AVX2, the
// products as well. Compiled by kernels.py with -DT=float -DFLOAT, or with -DT=bf16 for autocast: T is the type that
// the matrix products read and write; everything else is float. Arrays are channels-last: rows are pixels, columns the
// C channels. Sums over rows come in `parts`, each filled by one thread, and the caller adds them, so that results do
// not depend on the number of threads. Without OpenMP the loops run in one thread.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using i64 = int64_t;

struct bf16 {  // the upper half of a float
  uint16_t bits;
  operator float() const {
    uint32_t whole = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
  }
  bf16& operator=(float value) {  // to the nearest
    uint32_t whole;
    memcpy(&whole, &value, 4);
    bits = uint16_t((whole + 0x8000) >> 16);
    return *this;
  }
};

// 2^x for -126 < x < 126, relative error 1e-7: 2^n, as the exponent's bits, times a polynomial in what is left of x.
// Unlike std::exp2, compilers turn it into vector instructions.
inline float power_of_two(float x) {
  const float shifted = x + 12582912.f, f = x - (shifted - 12582912.f);  // 1.5 * 2^23: the sum is rounded to an integer
  float power = 1 + f * (0.69314697f + f * (0.24022120f + f * (0.05550713f + f * (0.00967554f + f * 0.00132765f))));
  int32_t bits, n;
  memcpy(&bits, &power, 4), memcpy(&n, &shifted, 4);
  bits += n << 23;
  memcpy(&power, &bits, 4);
  return power;
}

// GELU and its derivative. The formula for the normal distribution (Abramowitz and Stegun 7.1.26, error 1e-7) contains
// the exponential that the derivative needs too.
inline void gelu_of(float s, float& value, float& slope) {
  const float e = power_of_two(std::min(s * s, 170.f) * -0.72134752f);
  const float t = 1 / (1 + 0.23164190f * std::fabs(s));
  const float high = 0.710706871f + t * (-0.726576014f + t * 0.530702715f);
  const float tail = e * t * (0.127414796f + t * (-0.142248368f + t * high));  // the distribution at -|s|
  const float phi = s < 0 ? tail : 1 - tail;
  value = s * phi;
  slope = phi + s * 0.39894228f * e;
}

extern "C" {

// LayerNorm without its weight and bias: y = (x - mean) / std in each row; `scale` keeps 1 / std for the way back.
void normalize(int threads, i64 rows, i64 C, float eps, const float* x, T* y, float* scale) {
  const float inverse = 1.f / C;
#pragma omp parallel for num_threads(threads)
  for (i64 r = 0; r < rows; r++) {
    const float* u = x + r * C;
    T* v = y + r * C;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < C; c++) sum += u[c];
    const float mean = sum * inverse;
#pragma omp simd reduction(+ : squares)
    for (i64 c = 0; c < C; c++) squares += (u[c] - mean) * (u[c] - mean);
    const float factor = scale[r] = 1 / std::sqrt(squares * inverse + eps);
#pragma omp simd simdlen(16)
    for (i64 c = 0; c < C; c++) v[c] = (u[c] - mean) * factor;
  }
}

// `sums` adds dx over the rows: the gradient of the bias of the convolution before.
void normalize_back(int threads, i64 parts, i64 rows, i64 C, const T* dy, const T* y, const float* scale, float* dx,
                    float* sums) {
  const float inverse = 1.f / C;
#pragma omp parallel for num_threads(threads)
  for (i64 part = 0; part < parts; part++)
    for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const T *g = dy + r * C, *v = y + r * C;
      float *d = dx + r * C, *total = sums + part * C, sum = 0, dot = 0;
#pragma omp simd simdlen(16) reduction(+ : sum, dot)
      for (i64 c = 0; c < C; c++) sum += g[c], dot += g[c] * v[c];
      sum *= inverse, dot *= inverse;
#pragma omp simd simdlen(16)
      for (i64 c = 0; c < C; c++) {
        float value = scale[r] * (g[c] - sum - v[c] * dot);
        total[c] += value;
        d[c] = value;
      }
    }
}

// y = GELU(x + bias); x becomes the derivative, which is all that the way back needs.
void bias_gelu(int threads, i64 rows, i64 C, T* x, const float* bias, T* y) {
#pragma omp parallel for num_threads(threads)
  for (i64 r = 0; r < rows; r++) {
    T *u = x + r * C, *v = y + r * C;
#pragma omp simd
    for (i64 c = 0; c < C; c++) {
      float value, slope;
      gelu_of(u[c] + bias[c], value, slope);
      v[c] = value;
      u[c] = slope;
    }
  }
}

void bias_gelu_in_place(int threads, i64 rows, i64 C, T* x, const float* bias) {
#pragma omp parallel for num_threads(threads)
  for (i64 r = 0; r < rows; r++) {
    T* u = x + r * C;
#pragma omp simd
    for (i64 c = 0; c < C; c++) {
      float value, slope;
      gelu_of(u[c] + bias[c], value, slope);
      u[c] = value;
    }
  }
}

void gelu(int threads, i64 n, const T* x, T* y) {
#pragma omp parallel for simd num_threads(threads)
  for (i64 i = 0; i < n; i++) {
    float value, slope;
    gelu_of(x[i], value, slope);
    y[i] = value;
  }
}

void gelu_back(int threads, i64 n, const T* x, const T* dy, T* dx) {
#pragma omp parallel for simd num_threads(threads)
  for (i64 i = 0; i < n; i++) {
    float value, slope;
    gelu_of(x[i], value, slope);
    dx[i] = dy[i] * slope;
  }
}

void bias_gelu_back(int threads, i64 parts, i64 rows, i64 C, T* dy, const T* slope, float* dbias) {  // dy becomes dx
#pragma omp parallel for num_threads(threads)
  for (i64 part = 0; part < parts; part++)
    for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      T* g = dy + r * C;
      const T* s = slope + r * C;
      float* db = dbias + part * C;
#pragma omp simd
      for (i64 c = 0; c < C; c++) {
        float d = g[c] * s[c];
        g[c] = d;
        db[c] += d;
      }
    }
}

// y = shortcut + keep * gamma * (x + bias); stochastic depth's `keep` is one number for each image of `pixels` rows.
// These rows follow `first` others of the batch.
void scale_add(int threads, i64 first, i64 rows, i64 C, i64 pixels, const float* shortcut, const T* x,
               const float* bias, const float* gamma, const float* keep, float* y) {
#pragma omp parallel for num_threads(threads)
  for (i64 r = 0; r < rows; r++) {
    const float *s = shortcut + r * C, k = keep[(first + r) / pixels];
    const T* u = x + r * C;
    float* v = y + r * C;
#pragma omp simd
    for (i64 c = 0; c < C; c++) v[c] = s[c] + k * gamma[c] * (u[c] + bias[c]);
  }
}

void scale_add_back(int threads, i64 parts, i64 first, i64 rows, i64 C, i64 pixels, const float* dy, const T* x,
                    const float* bias, const float* gamma, const float* keep, T* dx, float* dbias, float* dgamma) {
#pragma omp parallel for num_threads(threads)
  for (i64 part = 0; part < parts; part++)
    for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const float *g = dy + r * C, k = keep[(first + r) / pixels];
      const T* u = x + r * C;
      T* d = dx + r * C;
      float *db = dbias + part * C, *dg = dgamma + part * C;
#pragma omp simd simdlen(16)
      for (i64 c = 0; c < C; c++) {
        float branch = k * g[c], value = branch * gamma[c];
        dg[c] += branch * (u[c] + bias[c]);
        db[c] += value;
        d[c] = value;
      }
    }
}

}  // extern "C"

#if defined(__AVX512F__)
const i64 LANES = 16;
#elif defined(__AVX__)
const i64 LANES = 8;
#else
const i64 LANES = 4;
#endif
typedef float lanes __attribute__((vector_size(4 * LANES)));  // so many channels, which one register holds
struct Pixel {
  lanes of;
};

// LANES channels from c on of an image (H, W, C), with `top` rows and columns of zeros before it, in rows of `pitch`.
void copy_in(const float* from, i64 H, i64 W, i64 C, i64 c, i64 top, i64 pitch, Pixel* to) {
  for (i64 y = 0; y < H; y++)
    for (i64 x = 0; x < W; x++) {
      const float* pixel = from + (y * W + x) * C + c;
      Pixel* place = to + (y + top) * pitch + x + top;
      if (C - c >= LANES) memcpy(place, pixel, 4 * LANES);  // a constant size is one instruction
      else memcpy(place, pixel, 4 * (C - c));
    }
}

const i64 TILE = 4;  // neighbouring pixels that share what is in registers

// dw[ky][kx][c] = sum over n, y, x of dy[n][y][x][c] * in[n][y + ky - K / 2][x + kx - K / 2][c].
template <int K>
void depthwise_back_of(int threads, i64 parts, i64 N, i64 H, i64 W, i64 C, const float* in, const float* dy,
                       float* dw) {
  const i64 P = K / 2, pitch = W + 2 * P + TILE, wide = W + TILE;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Pixel> image((H + 2 * P) * pitch), grad(H * wide);
#pragma omp for collapse(2)
    for (i64 part = 0; part < parts; part++)
      for (i64 c = 0; c < C; c += LANES)
        for (i64 n = part; n < N; n += parts) {
          copy_in(in + n * H * W * C, H, W, C, c, P, pitch, image.data());
          copy_in(dy + n * H * W * C, H, W, C, c, 0, wide, grad.data());
          for (i64 ky = 0; ky < K; ky++) {
            lanes sum[K] = {};
            for (i64 y = 0; y < H; y++)
              for (i64 x = 0; x < W; x += TILE) {
                const Pixel *row = &image[(y + ky) * pitch + x], *g = &grad[y * wide + x];
#pragma GCC unroll 16
                for (i64 i = 0; i < TILE; i++)
#pragma GCC unroll 16
                  for (i64 kx = 0; kx < K; kx++) sum[kx] += g[i].of * row[i + kx].of;
              }
            for (i64 kx = 0; kx < K; kx++)
              for (i64 i = 0; i < std::min(LANES, C - c); i++)
                dw[((part * K + ky) * K + kx) * C + c + i] += sum[kx][i];
          }
        }
  }
}

extern "C" void depthwise_back(int threads, i64 K, i64 parts, i64 N, i64 H, i64 W, i64 C, const float* in,
                               const float* dy, float* dw) {
  auto of = K == 3 ? depthwise_back_of<3> : K == 5 ? depthwise_back_of<5> : K == 7 ? depthwise_back_of<7>
            : K == 9 ? depthwise_back_of<9> : depthwise_back_of<11>;
  of(threads, parts, N, H, W, C, in, dy, dw);
}

#if defined(FLOAT) && defined(__AVX2__) && !defined(__AVX512F__)
// The same passes and the matrix products between them, on a few rows at a time, which stay in the cache. A thread that
// has finished a part takes the next one, because cores can differ in speed.

typedef float loose __attribute__((vector_size(4 * LANES), aligned(4)));  // `lanes` anywhere in memory
const i64 ROWS = 48;

// The columns of a matrix are packed in panels, each two registers wide, the last as wide as what is left, up to three.
inline i64 registers(i64 N) { return (N + LANES - 1) / LANES; }
inline i64 panels(i64 N) { return std::max<i64>(1, registers(N) / 2); }
inline i64 width(i64 N, i64 panel) { return panel < panels(N) - 1 ? 2 : registers(N) - 2 * panel; }

// `to`: the panels of the matrix (K, N) whose element (k, n) is from[k * down + n * across], filled up with zeros.
extern "C" void pack(int threads, i64 K, i64 N, i64 down, i64 across, const float* from, float* to) {
#pragma omp parallel for num_threads(threads)
  for (i64 p = 0; p < panels(N); p++) {
    const i64 first = 2 * p * LANES, wide = width(N, p) * LANES, filled = std::min(wide, N - first);
    float* panel = to + first * K;
    for (i64 k = 0; k < K; k++)
      for (i64 n = 0; n < wide; n++) panel[k * wide + n] = n < filled ? from[k * down + (first + n) * across] : 0;
  }
}

// Columns `first` and following of y (rows, N) = x (rows, K) times a panel of V registers, R rows at a time.
template <int R, int V>
void times_panel(i64 rows, i64 K, i64 N, i64 first, const float* x, const float* panel, float* y) {
  for (i64 r = 0; r < rows; r += R) {
    const float* in[R];
    for (i64 i = 0; i < R; i++) in[i] = x + std::min(r + i, rows - 1) * K;
    lanes sum[R][V] = {};
    const float* p = panel;
#pragma GCC unroll 4
    for (i64 k = 0; k < K; k++, p += V * LANES) {
      lanes w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) w[v] = *(const loose*)(p + v * LANES);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[i][v] += in[i][k] * w[v];
    }
    for (i64 i = 0; i < std::min<i64>(R, rows - r); i++) {
      float* out = y + (r + i) * N + first;
      if (first + V * LANES > N) memcpy(out, sum[i], 4 * (N - first));
      else
        for (int v = 0; v < V; v++) *(loose*)(out + v * LANES) = sum[i][v];
    }
  }
}

// y (rows, N) = x (rows, K) times packed columns. Twelve registers hold sums (six in a narrow panel), so that additions
// need not wait for each other.
void times(i64 rows, i64 K, i64 N, const float* x, const float* packed, float* y) {
  for (i64 p = 0; p < panels(N); p++) {
    const i64 first = 2 * p * LANES, wide = width(N, p);
    auto columns = wide == 3 ? times_panel<4, 3> : wide == 2 ? times_panel<6, 2> : times_panel<6, 1>;
    columns(rows, K, N, first, x, packed + first * K, y);
  }
}

// R rows and 2 * LANES columns of c (M, N) += the same of x (rows, M) transposed times y (rows, N).
template <int R>
void add_tile(i64 rows, i64 M, i64 N, const float* x, const float* y, float* c) {
  lanes sum[R][2];
  for (int i = 0; i < R; i++)
    for (int v = 0; v < 2; v++) sum[i][v] = *(const loose*)(c + i * N + v * LANES);
#pragma GCC unroll 4
  for (i64 r = 0; r < rows; r++, x += M, y += N) {
    const lanes left = *(const loose*)y, right = *(const loose*)(y + LANES);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) sum[i][0] += x[i] * left, sum[i][1] += x[i] * right;
  }
  for (int i = 0; i < R; i++)
    for (int v = 0; v < 2; v++) *(loose*)(c + i * N + v * LANES) = sum[i][v];
}

// c (M, N) += x (rows, M) transposed times y (rows, N), for even M and N a multiple of 2 * LANES.
void add_product(i64 rows, i64 M, i64 N, const float* x, const float* y, float* c) {
  for (i64 n = 0; n < N; n += 2 * LANES)
    for (i64 m = 0; m < M; m += 6) {
      auto tile = M - m == 2 ? add_tile<2> : M - m == 4 ? add_tile<4> : add_tile<6>;
      tile(rows, M, N, x + m, y + n, c + m * N + n);
    }
}

// The block after its depthwise convolution, whose output is `conv`. `normed`, `scale`, `slope`, `hidden` and `branch`
// are kept for the way back; without one, they are null.
extern "C" void pointwise(int threads, i64 parts, i64 rows, i64 C, i64 pixels, float eps, const float* x,
                          const float* conv, const float* weight1, const float* bias1, const float* weight2,
                          const float* bias2, const float* gamma, const float* keep, float* y, float* normed,
                          float* scale, float* slope, float* hidden, float* branch) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> own(normed ? 0 : ROWS * (6 * C + 1));
    float *n = own.data(), *b = n + ROWS * C, *h = b + ROWS * C, *s = h + ROWS * 4 * C;
#pragma omp for schedule(dynamic)
    for (i64 part = 0; part < parts; part++)
      for (i64 r = rows * part / parts, end = rows * (part + 1) / parts; r < end; r += ROWS) {
        const i64 some = std::min(ROWS, end - r);
        if (normed) n = normed + r * C, s = scale + r, h = hidden + r * 4 * C, b = branch + r * C;
        float* wide = normed ? slope + r * 4 * C : h;
        normalize(1, some, C, eps, conv + r * C, n, s);
        times(some, C, 4 * C, n, weight1, wide);
        if (normed) bias_gelu(1, some, 4 * C, wide, bias1, h);
        else bias_gelu_in_place(1, some, 4 * C, h, bias1);
        times(some, 4 * C, C, h, weight2, b);
        scale_add(1, r, some, C, pixels, x + r * C, b, bias2, gamma, keep, y + r * C);
      }
  }
}

// Its way back to `dconv`. Without `dweights`, `dbranch` and `dhidden` are kept for the gradients of the weights. With
// it, they are null, and the gradients of the second and of the transposed first weight are added up in its `parts`, for
// C a multiple of 4. The four gradients after `dconv` come in `parts`; `dbias` is that of the depthwise convolution.
extern "C" void pointwise_back(int threads, i64 parts, i64 rows, i64 C, i64 pixels, const float* dy,
                               const float* normed, const float* scale, const float* slope, const float* hidden,
                               const float* branch, const float* weight1, const float* weight2, const float* bias2,
                               const float* gamma, const float* keep, float* dbranch, float* dhidden, float* dweights,
                               float* dconv, float* dbias2, float* dgamma, float* dbias, float* dbias1) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> dnormed(ROWS * C), own(dweights ? ROWS * 5 * C : 0);
    float *db = own.data(), *dh = db + ROWS * C;
#pragma omp for schedule(dynamic)
    for (i64 part = 0; part < parts; part++)
      for (i64 r = rows * part / parts, end = rows * (part + 1) / parts; r < end; r += ROWS) {
        const i64 some = std::min(ROWS, end - r), c = r * C, c4 = r * 4 * C, p = part * C, p4 = part * 4 * C;
        if (!dweights) db = dbranch + c, dh = dhidden + c4;
        scale_add_back(1, 1, r, some, C, pixels, dy + c, branch + c, bias2, gamma, keep, db, dbias2 + p, dgamma + p);
        times(some, C, 4 * C, db, weight2, dh);
        bias_gelu_back(1, 1, some, 4 * C, dh, slope + c4, dbias1 + p4);
        times(some, 4 * C, C, dh, weight1, dnormed.data());
        if (dweights) {
          float* dw = dweights + part * 8 * C * C;
          add_product(some, C, 4 * C, db, hidden + c4, dw);
          add_product(some, C, 4 * C, normed + c, dh, dw + 4 * C * C);
        }
        normalize_back(1, 1, some, C, dnormed.data(), normed + c, scale + r, dconv + c, dbias + p);
      }
  }
}
#endif
