// x weight^T for few rows of x, at the speed at which memory gives the weights. few_rows.py compiles and calls this.
//
// Eight numbers lie in a register. A weight that has arrived is used for all rows of x that are being computed. Each sum is
// kept as several partial ones: an addition has to wait for the one before it in the same sum, not for those in others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <vector>

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

// x (T, K) as floats, laid out for weights of BITS bits. Eight words of 32 bits fill a register, and in each word lie W weights:
// first comes what the first weight of each word is multiplied by, then what the second is, and so on, and after them their sums.
// A weight is left at its place in the word, which makes it 16, 256, ... times too large, so x is made as many times smaller, and
// no bit is lost. (Only the last one is shifted down: up there it would be taken for a sign.)
template <int BITS, typename Number>
static at::Tensor for_integers(const at::Tensor& x, int64_t T, int64_t K) {
    constexpr int W = 32 / BITS;
    // Not a std::vector: that may begin in the middle of a line of the cache, and then every other load reads two lines.
    at::Tensor laid = at::empty({T, K + K / W}, x.options().dtype(at::kFloat));
    const Number* from = x.const_data_ptr<Number>();
    float* to = laid.mutable_data_ptr<float>();
    for (int64_t i = 0; i < T * K; i += 8 * W, to += 8 * W + 8)
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int j = 0; j < W; j++) {
                float value = from[i + W * n + j];
                sum += value;
                to[8 * j + n] = value / (j < W - 1 ? 1u << BITS * j : 1);
            }
            to[8 * W + n] = sum;
        }
    return laid;
}

// One row of weights times R rows of x -> out[r * stride]. What a group has in common is left to the end of each block:
// sum of scale * (w - zero) * x = scale * (sum of w * x - zero * sum of x). HALVES: the group is 32 weights, and four of the
// eight words belong to the next one.
template <int BITS, int R, bool HALVES, typename Number>
static void tile(const uint8_t* w, const Number* scale, const uint8_t* zero, int64_t group, const float* x, int64_t K,
                 Number* out, int64_t stride) {
    constexpr int W = 32 / BITS;
    const int64_t row = K + K / W, blocks = HALVES ? 1 : group / (8 * W);   // in a group
    Floats totals[R] = {}, scales, zeros;
    int64_t left = 0;
    for (const uint8_t* end = w + K * BITS / 8; w < end; w += 32, x += 8 * W + 8, left--) {
        if (HALVES || left == 0) {
            float s = scale[0], t = scale[HALVES], y = 1 << (BITS - 1), z = y;   // no zero: the integer in the middle
            if (zero) y = zero[0], z = zero[HALVES], zero += 1 + HALVES;
            scales = Floats{s, s, s, s, t, t, t, t}, zeros = Floats{y, y, y, y, z, z, z, z};
            scale += 1 + HALVES, left = blocks;
        }
        Words words = *(const Words*)w;
        if (BITS == 8) words ^= 0x80808080u;   // from -128 to 127 becomes from 0 to 255
        Floats sums[R] = {};
        for (int j = 0; j < W; j++) {
            Words one = j < W - 1 ? words & (((1u << BITS) - 1) << BITS * j) : words >> BITS * j;
            Floats weights = __builtin_convertvector((Integers)one, Floats);
            for (int r = 0; r < R; r++) sums[r] += weights * load(x + r * row + 8 * j);
        }
        for (int r = 0; r < R; r++) totals[r] += scales * (sums[r] - zeros * load(x + r * row + 8 * W));
    }
    for (int r = 0; r < R; r++) {
        float total = 0;
        for (int i = 0; i < 8; i++) total += totals[r][i];
        out[r * stride] = (Number)total;
    }
}

template <int BITS, bool HALVES, typename Number>
static void product(const at::Tensor& x, const uint8_t* w, const at::Tensor& scale, const uint8_t* zero, at::Tensor& out) {
    const int64_t T = x.size(0), K = x.size(1), N = out.size(1), groups = scale.numel() / N;
    const at::Tensor laid = for_integers<BITS, Number>(x, T, K);
    const float* rows = laid.const_data_ptr<float>();
    const Number* scales = scale.const_data_ptr<Number>();
    Number* to = out.mutable_data_ptr<Number>();
    at::parallel_for(0, N / 4, 16, [&](int64_t begin, int64_t end) {
        for (int64_t n = 4 * begin; n < 4 * end; n += 4)
            for (int64_t t = 0; t < T; t += 4)   // four rows of x, which stay in the cache for four of weights
                for (int64_t m = n; m < n + 4; m++) {
                    auto compute = [&](auto tile) {
                        tile(w + m * K * BITS / 8, scales + m * groups, zero ? zero + m * groups : nullptr, K / groups,
                             rows + t * laid.size(1), K, to + t * N + m, N);
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
                && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16), "few_rows: ", x.sizes(), ", ", x.scalar_type());
    TORCH_CHECK(N % 4 == 0 && K % 64 == 0 && (group == 32 || group % 64 == 0) && weight.is_contiguous()
                && scale.is_contiguous() && (!zero || (zero->is_contiguous() && zero->sizes() == scale.sizes())), "few_rows: ", N, " x ", K, ", groups of ", group);
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
