// x weight^T for few rows of x, at the speed at which memory gives the weights. few_rows.py compiles and calls this.
//
// Eight numbers lie in a register. A weight that has arrived is used for all rows of x that are being computed. Each sum is
// kept as several partial ones: an addition has to wait for the one before it in the same sum, not for those in others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <numeric>
#include <torch/library.h>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

typedef float Floats __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(32), aligned(4)));
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
at::Tensor few_rows(const at::Tensor& x, const at::Tensor& weight) {
    TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.scalar_type() == weight.scalar_type()
                && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16), "few_rows: ", x.scalar_type(), ", ", weight.scalar_type());
    const int64_t T = x.size(0), K = x.size(1), N = weight.size(0);
    TORCH_CHECK(N % 4 == 0 && K % 64 == 0 && weight.size(1) == K && weight.is_contiguous(), "few_rows: ", N, " x ", K);
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

// ------------------------------------------------------------------------------------------------------------- integers

// Integers times integers: x is rounded to 16 bits, with a scale for every chunk of its row, which is finer than bfloat16 by far. One
// instruction then multiplies 16 pairs and adds neighbours, with no conversion for each weight. In a chunk of a group,
//     sum of scale * (w - zero) * x  =  scale * scale of x * (sum of w * x  -  zero * sum of x)        all sums of integers, exact
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2)));

static inline Integers pairs(Shorts a, Shorts b) {   // of 16 products the sums of two neighbours each
#ifdef __AVX2__
    return (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    Integers sums;
    for (int i = 0; i < 8; i++) sums[i] = a[2 * i] * (int16_t)b[2 * i] + a[2 * i + 1] * (int16_t)b[2 * i + 1];
    return sums;
#endif
}

// x (T, K) in integers. In each of 16 lanes of a register lie W weights. So first comes what the first weight of every lane is multiplied
// by, then what the second is. For each chunk also the scale of x and, for the eight sums of pairs(), the sums of x.
struct Rows {
    std::vector<int16_t> integers;   // (T, K)
    std::vector<float> scale;        // (T, K / chunk)
    std::vector<float> sum;          // (T, K / chunk, 8)
};

template <int W, typename Number>
static Rows in_integers(const Number* x, int64_t T, int64_t K, int64_t chunk) {
    Rows rows{std::vector<int16_t>(T * K), std::vector<float>(T * K / chunk), std::vector<float>(8 * T * K / chunk)};
    int16_t* to = rows.integers.data();
    for (int64_t i = 0; i < T * K / chunk; i++, x += chunk) {
        float largest = 1e-30f;
        for (int64_t k = 0; k < chunk; k++) largest = std::max(largest, std::abs((float)x[k]));
        const float steps = 32767 / largest;
        Floats sum = {};
        for (int64_t k = 0; k < chunk; k += 16 * W)
            for (int j = 0; j < W; j++)
                for (int n = 0; n < 16; n++) {
                    *to = (int16_t)std::lrint((float)x[k + W * n + j] * steps);
                    sum[n / 2] += *to++;
                }
        rows.scale[i] = largest / 32767;
        *(Floats*)&rows.sum[8 * i] = sum;
    }
    return rows;
}

// One row of weights times R rows of x, from row t on -> out[r * stride]. HALVES: a chunk is two groups of 32, half of the sums for each.
template <int BITS, int R, bool HALVES, typename Number>
static void tile(const uint8_t* w, const Number* scale, const uint8_t* zero, const Rows& x, int64_t t, int64_t K, int64_t chunk, int64_t group,
                 Number* out, int64_t stride) {
    constexpr int W = 16 / BITS;
    const int64_t chunks = K / chunk, in_group = HALVES ? 1 : group / chunk;
    const int16_t* row = x.integers.data() + t * K;
    Floats totals[R] = {};
    for (int64_t c = 0, left = in_group; c < chunks; c++) {   // counted, because a division would take as long as the chunk
        Integers sums[R] = {};
        for (int64_t i = c * chunk; i < (c + 1) * chunk; i += 16 * W, w += 32) {
            Shorts lanes = *(const Shorts*)w;
            if (BITS == 8) lanes ^= 0x8080;   // from -128 to 127 becomes from 0 to 255
            for (int j = 0; j < W; j++) {
                Shorts one = j < W - 1 ? lanes >> BITS * j & (uint16_t)((1 << BITS) - 1) : lanes >> BITS * j;
                for (int r = 0; r < R; r++) sums[r] += pairs(one, *(const Shorts*)(row + r * K + i + 16 * j));
            }
        }
        const float s = scale[0], u = scale[HALVES];
        const float y = zero ? zero[0] : 1 << (BITS - 1), z = zero ? zero[HALVES] : y;   // no zero: the one in the middle
        for (int r = 0; r < R; r++) {
            const int64_t at = (t + r) * chunks + c;
            totals[r] += Floats{s, s, s, s, u, u, u, u} * x.scale[at]
                * (__builtin_convertvector(sums[r], Floats) - Floats{y, y, y, y, z, z, z, z} * load(&x.sum[8 * at]));
        }
        if (--left == 0) {
            left = in_group;
            scale += 1 + HALVES;
            zero += zero ? 1 + HALVES : 0;
        }
    }
    for (int r = 0; r < R; r++) {
        float total = 0;
        for (int i = 0; i < 8; i++) total += totals[r][i];
        out[r * stride] = (Number)total;
    }
}

template <int BITS, bool HALVES, typename Number>
static void product(const at::Tensor& x, const uint8_t* w, const at::Tensor& scale, const uint8_t* zero, at::Tensor& out) {
    const int64_t T = x.size(0), K = x.size(1), N = out.size(1), groups = scale.numel() / N, group = K / groups;
    const int64_t chunk = HALVES ? 64 : std::gcd(group, 512);   // not longer, or the sums might leave 32 bits
    const Rows rows = in_integers<16 / BITS>(x.const_data_ptr<Number>(), T, K, chunk);
    const Number* scales = scale.const_data_ptr<Number>();
    Number* to = out.mutable_data_ptr<Number>();
    at::parallel_for(0, N / 4, 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = 4 * begin; n < 4 * end; n += 4)
            for (int64_t t = 0; t < T; t += 4)   // four rows of x, which stay in the cache for four of weights
                for (int64_t m = n; m < n + 4; m++) {
                    auto compute = [&](auto tile) {
                        tile(w + m * K * BITS / 8, scales + m * groups, zero ? zero + m * groups : nullptr, rows, t, K, chunk, group, to + t * N + m, N);
                    };
                    if (T - t == 1) compute(tile<BITS, 1, HALVES, Number>);
                    if (T - t == 2) compute(tile<BITS, 2, HALVES, Number>);
                    if (T - t == 3) compute(tile<BITS, 3, HALVES, Number>);
                    if (T - t >= 4) compute(tile<BITS, 4, HALVES, Number>);
                }
    });
}

template <int BITS>
static at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor* zero) {
    const int64_t K = weight.size(1) * 8 / BITS, N = weight.size(0), group = K * N / scale.numel();
    TORCH_CHECK(x.dim() == 2 && x.size(1) == K && x.scalar_type() == scale.scalar_type()
                && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
                "few_rows: ", x.sizes(), ", ", x.scalar_type());
    TORCH_CHECK(N % 4 == 0 && K % 64 == 0 && (group == 32 || group % 64 == 0) && weight.is_contiguous()
                && scale.is_contiguous() && (!zero || (zero->is_contiguous() && zero->sizes() == scale.sizes())),
                "few_rows: ", N, " x ", K, ", groups of ", group);
    at::Tensor out = at::empty({x.size(0), N}, x.options());
    auto compute = [&](auto product) {
        product(x.contiguous(), (const uint8_t*)weight.const_data_ptr(), scale, zero ? zero->const_data_ptr<uint8_t>() : nullptr,
                out);
    };
    const bool halves = group == 32, is_float = x.scalar_type() == at::kFloat;
    if (is_float && halves) compute(product<BITS, true, float>);
    if (is_float && !halves) compute(product<BITS, false, float>);
    if (!is_float && halves) compute(product<BITS, true, at::BFloat16>);
    if (!is_float && !halves) compute(product<BITS, false, at::BFloat16>);
    return out;
}

// x (T, K) and scale (N,) of one dtype, weight (N, K) int8; N a multiple of 4 and K of 64. Returns (T, N).
at::Tensor few_rows_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale) {
    return product<8>(x, weight, scale, nullptr);
}

// weight (N, K / 2) uint8, as integers.pack4 packs; scale (N, K / group), zero the same in uint8, or none for 8 everywhere.
// A group is 32 weights or a multiple of 64.
at::Tensor few_rows_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                         const std::optional<at::Tensor>& zero) {
    return product<4>(x, weight, scale, zero ? &*zero : nullptr);
}

TORCH_LIBRARY_FRAGMENT(LIBRARY, library) {   // LIBRARY: the chapter's name, from the compiler's command line
    library.def("few_rows(Tensor x, Tensor weight) -> Tensor");
    library.impl("few_rows", torch::dispatch(c10::DispatchKey::CPU, few_rows));
    library.def("few_rows_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");
    library.impl("few_rows_int8", torch::dispatch(c10::DispatchKey::CPU, few_rows_int8));
    library.def("few_rows_int4(Tensor x, Tensor weight, Tensor scale, Tensor? zero) -> Tensor");
    library.impl("few_rows_int4", torch::dispatch(c10::DispatchKey::CPU, few_rows_int4));
}
