// Packs as the 32-bit words that they lie in, for kernels that compare and choose among elements but hardly compute with
// them: two 16-bit elements take one register and one instruction.
#pragma once
#include "common.cuh"

template <class To, class From> __device__ __forceinline__ To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// N elements: 16 bytes, or one; of a single 16-bit element the upper half of the word is 0.
template <class T, int N> struct Words {
    static_assert(N == WIDTH<T> || N == 1, "16 bytes or one element");
    static constexpr int PER_WORD = 4 / sizeof(T);
    static constexpr int COUNT = (N + PER_WORD - 1) / PER_WORD;
    uint32_t word[COUNT];
};

template <class T> __device__ __forceinline__ uint32_t word_of(T element) {
    uint32_t word = 0;
    memcpy(&word, &element, sizeof element);
    return word;
}

template <int N, class T> __device__ __forceinline__ Words<T, N> load_words(const T* from) {
    if constexpr (N == 1) {
        return {{word_of(*from)}};
    } else {
        const uint4 words = *reinterpret_cast<const uint4*>(from);
        return {{words.x, words.y, words.z, words.w}};
    }
}

template <int N, class T> __device__ __forceinline__ void store_words(T* to, const Words<T, N>& from) {
    if constexpr (N == 1) {
        memcpy(to, from.word, sizeof(T));
    } else {
        *reinterpret_cast<uint4*>(to) = make_uint4(from.word[0], from.word[1], from.word[2], from.word[3]);
    }
}

template <int N, class T> __device__ __forceinline__ Words<T, N> filled_words(float value) {
    const uint32_t element = word_of(from_float<T>(value));
    Words<T, N> words;
#pragma unroll
    for (uint32_t& word : words.word) word = N > 1 && sizeof(T) == 2 ? element << 16 | element : element;
    return words;
}

// Whole numbers in the elements' places.
template <int N, class T> __device__ __forceinline__ Words<T, N> whole_words(uint32_t value) {
    Words<T, N> words;
#pragma unroll
    for (uint32_t& word : words.word) word = N > 1 && sizeof(T) == 2 ? value << 16 | value : value;
    return words;
}

// The lowest byte of each element.
template <class T, int N> __device__ __forceinline__ Pack<uint8_t, N> low_bytes(const Words<T, N>& words) {
    constexpr int PER_WORD = Words<T, N>::PER_WORD;
    Pack<uint8_t, N> bytes;
#pragma unroll
    for (int k = 0; k < N; ++k) bytes.element[k] = uint8_t(words.word[k / PER_WORD] >> k % PER_WORD * (32 / PER_WORD));
    return bytes;
}

template <class T> struct PairOf;
template <> struct PairOf<bf16> {
    typedef __nv_bfloat162 Type;
};
template <> struct PairOf<f16> {
    typedef __half2 Type;
};

// All bits set where two elements are equal as numbers; NaN equals nothing.
template <class T> __device__ __forceinline__ uint32_t equal_mask(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(a) == __uint_as_float(b) ? 0xffffffffu : 0u;
    } else {
        typedef typename PairOf<T>::Type Pair;
        return __heq2_mask(bits_as<Pair>(a), bits_as<Pair>(b));
    }
}

// All bits set where the first of two elements is the greater one as a number; NaN never is.
template <class T> __device__ __forceinline__ uint32_t greater_mask(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        return __uint_as_float(a) > __uint_as_float(b) ? 0xffffffffu : 0u;
    } else {
        typedef typename PairOf<T>::Type Pair;
        return __hgt2_mask(bits_as<Pair>(a), bits_as<Pair>(b));
    }
}

// The larger of each two elements; NaN if one of them is.
template <class T> __device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
        const float x = __uint_as_float(a), y = __uint_as_float(b);
        return y > x || y != y ? b : a;
    } else {
        typedef typename PairOf<T>::Type Pair;
        return bits_as<uint32_t>(__hmax2_nan(bits_as<Pair>(a), bits_as<Pair>(b)));
    }
}
