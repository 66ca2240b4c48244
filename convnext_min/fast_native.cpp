// What a ConvNeXt block computes between its two matrix products, each in one pass over the memory, and the weight
// gradient of its depthwise convolution. Compiled by fast.py, once with -DT=float and once, for autocast, with -DT=bf16:
// what the matrix products read and write is T; the shortcut, the parameters and all sums are float. Arrays are
// channels-last: rows are pixels, columns the C channels. Sums over rows come in `parts`, of which each is one thread's
// at a time, and are added in fast.py: the result is the same for any number of threads.
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
  bf16& operator=(float value) {  // to the nearest, ties to even
    uint32_t whole;
    memcpy(&whole, &value, 4);
    bits = uint16_t((whole + 0x7fff + (whole >> 16 & 1)) >> 16);
    return *this;
  }
};

// 2^n times a polynomial, for x <= 0, relative error 1e-7: unlike std::exp, compilers turn it into vector instructions.
inline float exp_of_negative(float x) {
  x = std::max(x, -87.f) * 1.44269504f;
  float n = std::nearbyint(x), r = (x - n) * 0.69314718f, power;
  int32_t bits = (int32_t(n) + 127) << 23;
  memcpy(&power, &bits, 4);
  return power * (1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.04166573f + r * (0.00830952f + r * 0.00139365f))))));
}

extern "C" {

// y = (x - mean) / std * weight + bias in each row; `stats` keeps mean and 1 / std for the way back.
void layer_norm(i64 rows, i64 C, float eps, const float* x, const float* weight, const float* bias, T* y, float* stats) {
#pragma omp parallel for
  for (i64 r = 0; r < rows; r++) {
    const float* u = x + r * C;
    T* v = y + r * C;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (i64 c = 0; c < C; c++) sum += u[c];
    const float mean = sum / C;
#pragma omp simd reduction(+ : squares)
    for (i64 c = 0; c < C; c++) squares += (u[c] - mean) * (u[c] - mean);
    const float scale = 1 / std::sqrt(squares / C + eps);
#pragma omp simd
    for (i64 c = 0; c < C; c++) v[c] = (u[c] - mean) * scale * weight[c] + bias[c];
    stats[2 * r] = mean, stats[2 * r + 1] = scale;
  }
}

void layer_norm_back(i64 rows, i64 C, i64 parts, const T* dy, const float* x, const float* weight, const float* stats,
                     float* dx, float* dweight, float* dbias) {
#pragma omp parallel for
  for (i64 part = 0; part < parts; part++)
    for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const T* g = dy + r * C;
      const float *u = x + r * C, mean = stats[2 * r], scale = stats[2 * r + 1];
      float *d = dx + r * C, *dw = dweight + part * C, *db = dbias + part * C, sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (i64 c = 0; c < C; c++) {
        float normal = (u[c] - mean) * scale;
        dw[c] += g[c] * normal;
        db[c] += g[c];
        sum += g[c] * weight[c];
        dot += g[c] * weight[c] * normal;
      }
      sum /= C, dot /= C;
#pragma omp simd
      for (i64 c = 0; c < C; c++) d[c] = scale * (g[c] * weight[c] - sum - (u[c] - mean) * scale * dot);
    }
}

// y = GELU(x + bias); x becomes the derivative, which is all that the way back needs. The formula for the normal
// distribution (Abramowitz and Stegun 7.1.26, error 1e-7) contains the exponential that the derivative needs too.
void bias_gelu(i64 rows, i64 C, T* x, const float* bias, T* y) {
#pragma omp parallel for
  for (i64 r = 0; r < rows; r++) {
    T *u = x + r * C, *v = y + r * C;
#pragma omp simd
    for (i64 c = 0; c < C; c++) {
      float s = u[c] + bias[c], z = std::fabs(s) * 0.70710678f, e = exp_of_negative(-z * z), t = 1 / (1 + 0.3275911f * z);
      float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
      float phi = s < 0 ? 0.5f * p * e : 1 - 0.5f * p * e;
      v[c] = s * phi;
      u[c] = phi + s * 0.39894228f * e;
    }
  }
}

void bias_gelu_back(i64 rows, i64 C, i64 parts, T* dy, const T* slope, float* dbias) {  // dy becomes dx
#pragma omp parallel for
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
void scale_add(i64 rows, i64 C, i64 pixels, const float* shortcut, const T* x, const float* bias, const float* gamma,
               const float* keep, float* y) {
#pragma omp parallel for
  for (i64 r = 0; r < rows; r++) {
    const float *s = shortcut + r * C, k = keep[r / pixels];
    const T* u = x + r * C;
    float* v = y + r * C;
#pragma omp simd
    for (i64 c = 0; c < C; c++) v[c] = s[c] + k * gamma[c] * (u[c] + bias[c]);
  }
}

void scale_add_back(i64 rows, i64 C, i64 parts, i64 pixels, const float* dy, const T* x, const float* bias,
                    const float* gamma, const float* keep, T* dx, float* dbias, float* dgamma) {
#pragma omp parallel for
  for (i64 part = 0; part < parts; part++)
    for (i64 r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      const float *g = dy + r * C, k = keep[r / pixels];
      const T* u = x + r * C;
      T* d = dx + r * C;
      float *db = dbias + part * C, *dg = dgamma + part * C;
#pragma omp simd
      for (i64 c = 0; c < C; c++) {
        float branch = k * g[c];
        dg[c] += branch * (u[c] + bias[c]);
        db[c] += branch * gamma[c];
        d[c] = branch * gamma[c];
      }
    }
}

}  // extern "C"

// dw[ky][kx][c] = sum over n, y, x of dy[n][y][x][c] * in[n][y * stride + ky - K / 2][x * stride + kx - K / 2][c].
// Sixteen channels at a time are copied out, the input with zeros around it; a row of K sums stays in registers.
template <int K>
void weight_grad_of(i64 parts, i64 N, i64 H, i64 W, i64 C, i64 stride, const float* in, const float* dy, float* dw) {
  typedef float lanes __attribute__((vector_size(64)));
  struct Pixel {
    lanes of;
  };
  const i64 P = K / 2, h = (H - 1) / stride + 1, w = (W - 1) / stride + 1, padded = W + 2 * P;
#pragma omp parallel for collapse(2)
  for (i64 part = 0; part < parts; part++)
    for (i64 c = 0; c < C; c += 16) {
      const i64 count = std::min<i64>(16, C - c);
      auto copy = [=](const float* from, i64 rows, i64 columns, Pixel* to, i64 pitch) {
        for (i64 i = 0; i < rows; i++)
          for (i64 j = 0; j < columns; j++) {
            const float* pixel = from + (i * columns + j) * C;
            if (count == 16) memcpy(to + i * pitch + j, pixel, 64);  // a constant size is one instruction
            else memcpy(to + i * pitch + j, pixel, 4 * count);
          }
      };
      std::vector<Pixel> image((H + 2 * P) * padded), grad(h * w);
      for (i64 n = part; n < N; n += parts) {
        copy(in + n * H * W * C + c, H, W, &image[P * padded + P], padded);
        copy(dy + n * h * w * C + c, h, w, &grad[0], w);
        for (i64 ky = 0; ky < K; ky++) {
          lanes sum[K] = {};
          for (i64 y = 0; y < h; y++)
            for (i64 x = 0; x < w; x++)
              for (i64 kx = 0; kx < K; kx++) sum[kx] += grad[y * w + x].of * image[(y * stride + ky) * padded + x * stride + kx].of;
          for (i64 kx = 0; kx < K; kx++)
            for (i64 i = 0; i < count; i++) dw[((part * K + ky) * K + kx) * C + c + i] += sum[kx][i];
        }
      }
    }
}

extern "C" void weight_grad(i64 K, i64 parts, i64 N, i64 H, i64 W, i64 C, i64 stride, const float* in, const float* dy, float* dw) {
  auto of = K == 3 ? weight_grad_of<3> : K == 5 ? weight_grad_of<5> : K == 7 ? weight_grad_of<7> : K == 9 ? weight_grad_of<9> : weight_grad_of<11>;
  of(parts, N, H, W, C, stride, in, dy, dw);
}
