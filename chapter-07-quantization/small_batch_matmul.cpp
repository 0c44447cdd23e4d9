// x weight^T for few rows of x, at the speed at which memory gives the weights: floats, then integers; and attention of one token.
// small_batch_matmul.py compiles and calls this.
//
// Eight numbers lie in a register. A weight that has arrived is used for all rows of x that are being computed. Each sum is
// kept as several partial ones: an addition has to wait for the one before it in the same sum, not for those in others.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <cstring>
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

// ------------------------------------------------------------------------------------------------------------- integers

// Integers times integers: x is rounded to 16 bits, with a scale for every chunk of its row. That is finer than bfloat16, where no
// number is hundreds of times larger than the others of its chunk. One instruction then multiplies 16 pairs and adds neighbours,
// with no conversion for each weight. In a chunk of a group,
//     sum of scale * (w - zero) * x  =  scale * scale of x * (sum of w * x  -  zero * sum of x)        with sums of integers
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

// The same number eight times, or one four times and the next four times.
template <bool HALVES>
static inline Floats spread(const float* p) {
    const Floats a = Floats{} + p[0], b = Floats{} + p[HALVES];
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 12, 13, 14, 15);
}

static inline float total(Floats x) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += x[i];
    return sum;
}

// R rows of x in integers. In each of 16 lanes of a register lie W weights. So first comes, for each row, what the first weight of
// every lane is multiplied by, then what the second is. For each chunk and row also the scale of x and, for the eight sums of
// pairs(), the sums of x.
struct alignas(32) Lanes { int16_t at[16]; };   // aligned, or every other one would lie in two lines of the cache
struct alignas(32) Sums { float at[8]; };
struct Rows {
    std::vector<Lanes> integers;   // (K / 16, R)
    std::vector<float> scale;      // (K / CHUNK, R)
    std::vector<Sums> sum;         // (K / CHUNK, R)
};

template <int W, int CHUNK, typename Number>
static Rows in_integers(const Number* x, int64_t R, int64_t K) {
    Rows rows{std::vector<Lanes>(R * K / 16), std::vector<float>(R * K / CHUNK), std::vector<Sums>(R * K / CHUNK)};
    for (int64_t r = 0; r < R; r++)
        for (int64_t c = 0; c < K / CHUNK; c++, x += CHUNK) {
            float numbers[CHUNK], largest = 1e-30f;
            for (int k = 0; k < CHUNK; k++) numbers[k] = x[k];
            // Without the sign, floats and their bits have the same order, and a nan is the largest: it must not get lost here.
            int32_t bits[CHUNK], most;
            std::memcpy(bits, numbers, sizeof bits);
            std::memcpy(&most, &largest, sizeof most);
            for (int k = 0; k < CHUNK; k++) most = std::max(most, bits[k] & 0x7fffffff);
            std::memcpy(&largest, &most, sizeof most);
            const float steps = 32767 / largest;
            int16_t integers[CHUNK];
            for (int k = 0; k < CHUNK; k++) integers[k] = (int16_t)std::nearbyint(numbers[k] * steps);
            Integers sum = {};
            for (int k = 0; k < CHUNK; k += 16 * W)
                for (int j = 0; j < W; j++) {
                    Lanes& to = rows.integers[(c * CHUNK + k + 16 * j) / 16 * R + r];
                    for (int n = 0; n < 16; n++) to.at[n] = integers[k + W * n + j];
                    sum += pairs(Shorts{} + 1, *(const Shorts*)to.at);
                }
            *(Floats*)rows.sum[c * R + r].at = __builtin_convertvector(sum, Floats);
            rows.scale[c * R + r] = largest / 32767;
        }
    return rows;
}

// One row of weights, with a scale and a zero point for each chunk, times R rows of x -> out[r * stride].
// HALVES: a chunk is two groups of 32, half of the sums for each.
template <int BITS, int CHUNK, int R, bool HALVES, typename Number>
static void tile(const uint8_t* w, const float* scale, const float* zero, const Rows& x, int64_t chunks, Number* out, int64_t stride) {
    constexpr int W = 16 / BITS;   // weights in a lane
    const Lanes* lane = x.integers.data();
    const float* x_scale = x.scale.data();
    const Sums* x_sum = x.sum.data();
    Floats totals[R] = {};
    for (int64_t c = 0; c < chunks; c++) {
        Integers sums[R] = {};
        for (int i = 0; i < CHUNK; i += 16 * W, w += 32) {
            // The processor fetches by itself what follows, but begins anew on every page of 4 KB. So ask, once for each line of the
            // cache (512 bits), for what comes half a page later.
            if (i * BITS % 512 == 0) __builtin_prefetch(w + 2048);
            Shorts lanes = *(const Shorts*)w;
            if (BITS == 8) lanes ^= 0x8080;   // from -128 to 127 becomes from 0 to 255
            for (int j = 0; j < W; j++) {
                Shorts one = j < W - 1 ? lanes >> BITS * j & (uint16_t)((1 << BITS) - 1) : lanes >> BITS * j;
                for (int r = 0; r < R; r++) sums[r] += pairs(one, *(const Shorts*)(lane++)->at);
            }
        }
        const Floats s = spread<HALVES>(scale), z = spread<HALVES>(zero);
        for (int r = 0; r < R; r++)
            totals[r] += s * *x_scale++ * (__builtin_convertvector(sums[r], Floats) - z * load((x_sum++)->at));
        scale += 1 + HALVES;
        zero += 1 + HALVES;
    }
    for (int r = 0; r < R; r++) out[r * stride] = (Number)total(totals[r]);
}

template <int BITS, int CHUNK, bool HALVES, typename Number>
static void product(const at::Tensor& x, const uint8_t* w, const at::Tensor& scale, const uint8_t* zero, at::Tensor& out) {
    const int64_t T = x.size(0), K = x.size(1), N = out.size(1), groups = scale.numel() / N, chunks = K / CHUNK;
    const int64_t of_row = HALVES ? groups : chunks, in_group = of_row / groups;   // scales for each chunk, or for each of its halves
    const Number *numbers = x.const_data_ptr<Number>(), *scales = scale.const_data_ptr<Number>();
    Number* to = out.mutable_data_ptr<Number>();
    std::vector<Rows> rows;   // four at a time, which stay in the cache for four rows of weights
    for (int64_t t = 0; t < T; t += 4) rows.push_back(in_integers<16 / BITS, CHUNK>(numbers + t * K, std::min<int64_t>(4, T - t), K));
    at::parallel_for(0, N / 4, 16, [&](int64_t begin, int64_t end) {
        std::vector<float> s(4 * of_row), z(4 * of_row, 1 << (BITS - 1));   // no zero: the one in the middle
        for (int64_t n = 4 * begin; n < 4 * end; n += 4) {
            // All scales of four rows at once: to make one float after the other would take as long as the products.
            for (int64_t i = 0; i < in_group; i++)
                for (int64_t g = 0; g < 4 * groups; g++) s[g * in_group + i] = scales[n * groups + g];
            for (int64_t i = 0; zero && i < in_group; i++)
                for (int64_t g = 0; g < 4 * groups; g++) z[g * in_group + i] = zero[n * groups + g];
            for (int64_t t = 0; t < T; t += 4)
                for (int64_t m = 0; m < 4; m++) {
                    auto compute = [&](auto tile) {
                        tile(w + (n + m) * K * BITS / 8, &s[m * of_row], &z[m * of_row], rows[t / 4], chunks, to + t * N + n + m, N);
                    };
                    if (T - t == 1) compute(tile<BITS, CHUNK, 1, HALVES, Number>);
                    if (T - t == 2) compute(tile<BITS, CHUNK, 2, HALVES, Number>);
                    if (T - t == 3) compute(tile<BITS, CHUNK, 3, HALVES, Number>);
                    if (T - t >= 4) compute(tile<BITS, CHUNK, 4, HALVES, Number>);
                }
        }
    });
}

template <int BITS>
static at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, const at::Tensor* zero) {
    TORCH_CHECK(weight.dim() == 2 && weight.numel() && scale.dim() && scale.numel(), "small_batch_matmul: ", weight.sizes(), ", scale ", scale.sizes());
    const int64_t K = weight.size(1) * 8 / BITS, N = weight.size(0), group = K * N / scale.numel();
    TORCH_CHECK(x.dim() == 2 && x.size(1) == K && x.scalar_type() == scale.scalar_type()
                && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16),
                "small_batch_matmul: ", x.sizes(), ", ", x.scalar_type());
    TORCH_CHECK(weight.scalar_type() == (BITS == 8 ? at::kChar : at::kByte) && scale.size(0) == N
                && (BITS == 8 ? scale.dim() == 1 : scale.dim() == 2 && K % scale.size(1) == 0),
                "small_batch_matmul: ", weight.scalar_type(), ", scale ", scale.sizes());
    TORCH_CHECK(N % 4 == 0 && K % 64 == 0 && (group == 32 || group % 64 == 0) && weight.is_contiguous()
                && scale.is_contiguous() && (!zero || (zero->is_contiguous() && zero->sizes() == scale.sizes())),
                "small_batch_matmul: ", N, " x ", K, ", groups of ", group);
    at::Tensor out = at::empty({x.size(0), N}, x.options());
    auto compute = [&](auto product) {
        product(x.contiguous(), (const uint8_t*)weight.const_data_ptr(), scale, zero ? zero->const_data_ptr<uint8_t>() : nullptr,
                out);
    };
    constexpr int LONG = BITS == 8 ? 512 : 128;   // the longest chunk: longer ones are no faster, and x's scale would be coarser
    auto for_dtype = [&](auto number) {
        typedef decltype(number) Number;
        if (group == 32) compute(product<BITS, 64, true, Number>);
        else if (group % LONG == 0) compute(product<BITS, LONG, false, Number>);
        else compute(product<BITS, 64, false, Number>);
    };
    if (x.scalar_type() == at::kFloat) for_dtype(float());
    else for_dtype(at::BFloat16());
    return out;
}

// x (T, K) and scale (N,) of one dtype, weight (N, K) int8; N a multiple of 4 and K of 64. Returns (T, N).
at::Tensor small_batch_int8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale) {
    return product<8>(x, weight, scale, nullptr);
}

// weight (N, K / 2) uint8, as integers.pack4 packs; scale (N, K / group), zero the same in uint8, or none for 8 everywhere.
// A group is 32 weights or a multiple of 64.
at::Tensor small_batch_int4(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                         const std::optional<at::Tensor>& zero) {
    return product<4>(x, weight, scale, zero ? &*zero : nullptr);
}

// ------------------------------------------------------------------------------------------------------------ attention

// Eight numbers of a key or value.
static inline Floats eight(const float* p) { return load(p); }
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));
static inline Floats eight(const at::BFloat16* p) { return (Floats)(__builtin_convertvector(*(const Halves*)p, Words) << 16); }

// The query heads q (n, K) that share one key and value head, over the L tokens whose keys and values at(t) finds -> out (n, K).
template <typename Number, typename Place>
static void attend(const Number* q, const Number* k, const Number* v, Place at, int64_t L, int64_t n, int64_t K, Number* out) {
    std::vector<float> query(n * K), scores(n * L), mixed(n * K);
    const float scale = 1 / std::sqrt((float)K);
    for (int64_t i = 0; i < n * K; i++) query[i] = q[i] * scale;
    for (int64_t t = 0; t < L; t++) {
        const Number* key = k + at(t);
        for (int64_t h = 0; h < n; h++) {
            Floats sum = {};
            for (int64_t i = 0; i < K; i += 8) sum += load(&query[h * K + i]) * eight(key + i);
            scores[h * L + t] = total(sum);
        }
    }
    for (int64_t h = 0; h < n; h++) {
        float *p = &scores[h * L], largest = p[0], sum = 0;
        for (int64_t t = 0; t < L; t++) largest = std::max(largest, p[t]);
        for (int64_t t = 0; t < L; t++) sum += p[t] = std::exp(p[t] - largest);
        for (int64_t t = 0; t < L; t++) p[t] /= sum;
    }
    for (int64_t t = 0; t < L; t++) {
        const Number* value = v + at(t);
        for (int64_t h = 0; h < n; h++)
            for (int64_t i = 0; i < K; i += 8) *(Floats*)&mixed[h * K + i] += scores[h * L + t] * eight(value + i);
    }
    for (int64_t i = 0; i < n * K; i++) out[i] = (Number)mixed[i];
}

// kv_cache.cached_attention where every sequence has one new token: q (S, H, K), k and v (N, P, G, K), table (S, B) and ends (S,)
// int32; K a multiple of 8. Returns (S, H, K).
at::Tensor one_token_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& table, const at::Tensor& ends) {
    TORCH_CHECK(q.dim() == 3 && k.dim() == 4 && table.dim() == 2 && k.numel() && table.size(1) && ends.dim() == 1 && ends.is_contiguous(),
                "one_token_attention: ", q.sizes(), ", ", k.sizes(), ", ", table.sizes(), ", ", ends.sizes());
    const int64_t S = q.size(0), H = q.size(1), K = q.size(2), P = k.size(1), G = k.size(2), B = table.size(1);
    TORCH_CHECK((q.scalar_type() == at::kFloat || q.scalar_type() == at::kBFloat16) && k.scalar_type() == q.scalar_type()
                && v.scalar_type() == q.scalar_type() && K % 8 == 0 && H % G == 0 && k.size(3) == K && v.sizes() == k.sizes()
                && k.is_contiguous() && v.is_contiguous() && table.is_contiguous() && table.size(0) == S && ends.numel() == S,
                "one_token_attention: ", q.sizes(), ", ", q.scalar_type(), ", ", k.sizes(), ", ", k.scalar_type());
    at::Tensor out = at::empty({S, H, K}, q.options()), queries = q.contiguous();
    const int *blocks = table.const_data_ptr<int>(), *end = ends.const_data_ptr<int>();
    for (int64_t s = 0; s < S; s++) {
        TORCH_CHECK(end[s] >= 1 && end[s] <= B * P, "one_token_attention: ", end[s], " tokens in ", B, " blocks of ", P);
        for (int64_t b = s * B; b <= s * B + (end[s] - 1) / P; b++)
            TORCH_CHECK(blocks[b] >= 0 && blocks[b] < k.size(0), "one_token_attention: block ", blocks[b], " of ", k.size(0));
    }
    auto compute = [&](auto number) {
        typedef decltype(number) Number;
        at::parallel_for(0, S * G, 1 + 100000 / (B * P * K), [&](int64_t first, int64_t last) {   // a thread for less would cost more
            for (int64_t i = first; i < last; i++) {
                const int64_t s = i / G, g = i % G;
                auto at = [&](int64_t t) { return ((blocks[s * B + t / P] * P + t % P) * G + g) * K; };
                attend(queries.const_data_ptr<Number>() + i * (H / G) * K, k.const_data_ptr<Number>(), v.const_data_ptr<Number>(), at,
                       end[s], H / G, K, out.mutable_data_ptr<Number>() + i * (H / G) * K);
            }
        });
    };
    if (q.scalar_type() == at::kFloat) compute(float());
    else compute(at::BFloat16());
    return out;
}

TORCH_LIBRARY_FRAGMENT(LIBRARY, library) {   // LIBRARY: the chapter's name, from the compiler's command line
    library.def("small_batch_matmul(Tensor x, Tensor weight) -> Tensor");
    library.impl("small_batch_matmul", torch::dispatch(c10::DispatchKey::CPU, small_batch_matmul));
    library.def("small_batch_int8(Tensor x, Tensor weight, Tensor scale) -> Tensor");
    library.impl("small_batch_int8", torch::dispatch(c10::DispatchKey::CPU, small_batch_int8));
    library.def("small_batch_int4(Tensor x, Tensor weight, Tensor scale, Tensor? zero) -> Tensor");
    library.impl("small_batch_int4", torch::dispatch(c10::DispatchKey::CPU, small_batch_int4));
    library.def("one_token_attention(Tensor q, Tensor k, Tensor v, Tensor table, Tensor ends) -> Tensor");
    library.impl("one_token_attention", torch::dispatch(c10::DispatchKey::CPU, one_token_attention));
}
