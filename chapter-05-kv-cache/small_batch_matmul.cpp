// x weight^T for few rows of x, at the speed at which memory gives the weights. small_batch_matmul.py compiles and calls this.
//
// Eight numbers lie in a register. A weight that has arrived is used for all rows of x that are being computed. Each sum is
// kept as several partial ones: an addition has to wait for the one before it in the same sum, not for those in others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vector>

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4)));
struct Sixteen { Floats a, b; };

static inline Floats load(const float* p) { return *(const Floats*)p; }

static inline Sixteen sixteen(const float* p) { return {load(p), load(p + 8)}; }

// Sixteen bfloat16 are eight words of 32 bits. A bfloat16 is the upper half of a float32, so a word whose lower half is made
// zero is the second number of the pair, and one that is shifted up is the first: no conversion, but x must be laid out
// likewise, the eight at even places before the eight at odd ones.
static inline Sixteen sixteen(const uint16_t* p) {
    Words pairs = *(const Words*)p;
    return {(Floats)(pairs << 16), (Floats)(pairs & 0xffff0000u)};
}

// N rows of weights times R rows of x, each K long, U times sixteen numbers at a time -> out[r * stride + n].
template <int N, int R, int U, typename Weight, typename Out>
static void tile(const Weight* w, const float* x, int64_t K, Out* out, int64_t stride) {
    Floats sums[N][R][U] = {};
    for (int64_t k = 0; k < K; k += 16 * U)
        for (int u = 0; u < U; u++)
            for (int n = 0; n < N; n++) {
                Sixteen weights = sixteen(w + n * K + k + 16 * u);
                for (int r = 0; r < R; r++) sums[n][r][u] += weights.a * load(x + r * K + k + 16 * u);
                for (int r = 0; r < R; r++) sums[n][r][u] += weights.b * load(x + r * K + k + 16 * u + 8);
            }
    for (int n = 0; n < N; n++)
        for (int r = 0; r < R; r++) {
            float total = 0;
            for (int u = 0; u < U; u++)
                for (int i = 0; i < 8; i++) total += sums[n][r][u][i];
            out[r * stride + n] = (Out)total;
        }
}

template <typename Weight, typename Out>
static void product(const Weight* w, const float* x, Out* out, int64_t T, int64_t N, int64_t K) {
    at::parallel_for(0, N / 4, 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = 4 * begin; n < 4 * end; n += 4) {
            if (T <= 4)   // bound by memory: one row of weights after the other, from beginning to end
                for (int64_t m = n; m < n + 4; m++) {
                    if (T == 1) tile<1, 1, 4>(w + m * K, x, K, out + m, N);
                    if (T == 2) tile<1, 2, 2>(w + m * K, x, K, out + m, N);
                    if (T == 3) tile<1, 3, 2>(w + m * K, x, K, out + m, N);
                    if (T == 4) tile<1, 4, 2>(w + m * K, x, K, out + m, N);
                }
            else {        // bound by arithmetic: as many sums as registers hold, and what is loaded is used several times
                int64_t t = 0;
                for (; t + 4 <= T; t += 4)
                    for (int64_t m = n; m < n + 4; m += 2) tile<2, 4, 1>(w + m * K, x + t * K, K, out + t * N + m, N);
                if (T - t == 3) tile<4, 3, 1>(w + n * K, x + t * K, K, out + t * N + n, N);
                if (T - t == 2) tile<4, 2, 1>(w + n * K, x + t * K, K, out + t * N + n, N);
                if (T - t == 1) tile<4, 1, 2>(w + n * K, x + t * K, K, out + t * N + n, N);
            }
        }
    });
}

// x (T, K), weight (N, K), both float32 or both bfloat16; N a multiple of 4 and K of 64. Returns (T, N).
at::Tensor small_batch_matmul(const at::Tensor& x, const at::Tensor& weight) {
    TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.scalar_type() == weight.scalar_type()
                && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16), "small_batch_matmul: ", x.scalar_type(), ", ", weight.scalar_type());
    const int64_t T = x.size(0), K = x.size(1), N = weight.size(0);
    TORCH_CHECK(N % 4 == 0 && K % 64 == 0 && weight.size(1) == K && weight.is_contiguous(), "small_batch_matmul: ", N, " x ", K);
    at::Tensor out = at::empty({T, N}, x.options()), rows = x.contiguous();
    if (weight.scalar_type() == at::kFloat) {
        product(weight.const_data_ptr<float>(), rows.const_data_ptr<float>(), out.mutable_data_ptr<float>(), T, N, K);
        return out;
    }
    std::vector<float> wide(T * K);   // in the order of sixteen(): those at even places, then those at odd ones
    const at::BFloat16* from = rows.const_data_ptr<at::BFloat16>();
    for (int64_t i = 0; i < T * K; i += 16)
        for (int64_t j = 0; j < 8; j++) {
            wide[i + j] = from[i + 2 * j];
            wide[i + 8 + j] = from[i + 2 * j + 1];
        }
    product((const uint16_t*)weight.const_data_ptr(), wide.data(), out.mutable_data_ptr<at::BFloat16>(), T, N, K);
    return out;
}

TORCH_LIBRARY_FRAGMENT(LIBRARY, library) {   // LIBRARY: the chapter's name, from the compiler's command line
    library.def("small_batch_matmul(Tensor x, Tensor weight) -> Tensor");
    library.impl("small_batch_matmul", torch::dispatch(c10::DispatchKey::CPU, small_batch_matmul));
}
