// Multiplication in bfloat16 with float32 sums, by AVX-512 BF16: weights but float32 are converted, exactly.

// The bfloat16 of each float8_e4m3fn that is not negative.
static const uint16_t kFp8Table[128] = {
    0x0000, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60, 0x3c80, 0x3c90, 0x3ca0, 0x3cb0, 0x3cc0, 0x3cd0,
    0x3ce0, 0x3cf0, 0x3d00, 0x3d10, 0x3d20, 0x3d30, 0x3d40, 0x3d50, 0x3d60, 0x3d70, 0x3d80, 0x3d90, 0x3da0, 0x3db0,
    0x3dc0, 0x3dd0, 0x3de0, 0x3df0, 0x3e00, 0x3e10, 0x3e20, 0x3e30, 0x3e40, 0x3e50, 0x3e60, 0x3e70, 0x3e80, 0x3e90,
    0x3ea0, 0x3eb0, 0x3ec0, 0x3ed0, 0x3ee0, 0x3ef0, 0x3f00, 0x3f10, 0x3f20, 0x3f30, 0x3f40, 0x3f50, 0x3f60, 0x3f70,
    0x3f80, 0x3f90, 0x3fa0, 0x3fb0, 0x3fc0, 0x3fd0, 0x3fe0, 0x3ff0, 0x4000, 0x4010, 0x4020, 0x4030, 0x4040, 0x4050,
    0x4060, 0x4070, 0x4080, 0x4090, 0x40a0, 0x40b0, 0x40c0, 0x40d0, 0x40e0, 0x40f0, 0x4100, 0x4110, 0x4120, 0x4130,
    0x4140, 0x4150, 0x4160, 0x4170, 0x4180, 0x4190, 0x41a0, 0x41b0, 0x41c0, 0x41d0, 0x41e0, 0x41f0, 0x4200, 0x4210,
    0x4220, 0x4230, 0x4240, 0x4250, 0x4260, 0x4270, 0x4280, 0x4290, 0x42a0, 0x42b0, 0x42c0, 0x42d0, 0x42e0, 0x42f0,
    0x4300, 0x4310, 0x4320, 0x4330, 0x4340, 0x4350, 0x4360, 0x4370, 0x4380, 0x4390, 0x43a0, 0x43b0, 0x43c0, 0x43d0,
    0x43e0, 0x7fc0};

struct Bfloat16 {
  static constexpr Kind kFirstKind = Kind::kBfloat16;  // weights of float32 are multiplied in float32
  static constexpr int kStep = 32;  // inputs of a Unit
  static constexpr int kMaxRows = 8, kSums = 16;  // what registers can hold
  static constexpr int kInputs = 2, kColumns = 32;  // of a Tile
  static constexpr int kTiles = 8;

  typedef uint16_t Element;
  typedef __m512i Unit;  // 32 inputs
  typedef __m512 Sums;
  struct Tile {
    __m512i v[2];  // pairs of inputs for 16 outputs, and for 16 more
  };

  static INLINE uint16_t ToElement(float x) { return ToBfloat16(x); }
  static INLINE int64_t Position(Kind, int64_t c) { return c; }

  static INLINE __m512 Dot(__m512 sums, __m512i w, __m512i x) {
    return _mm512_dpbf16_ps(sums, (__m512bh)w, (__m512bh)x);
  }

  // 32 integers from 16 bytes of int4: a table's entries at the four bits, low before high.
  static INLINE __m512i OfNibbles(const uint8_t* from) {
    static const uint16_t kTable[32] = {
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  // 0 to 7
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 to -1, and again for an index's fifth bit
        0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80};
    const __m512i bytes = (__m512i)OfBytes(from);
    const __m512i indices = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));
    return _mm512_permutexvar_epi16(indices, _mm512_loadu_si512(kTable));
  }

  static INLINE __m512i OfFp8(const uint8_t* from) {
    const __m512i* table = (const __m512i*)kFp8Table;  // of the 128 numbers that are not negative
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i low = _mm512_permutex2var_epi16(_mm512_loadu_si512(table), bytes, _mm512_loadu_si512(table + 1));
    const __m512i high = _mm512_permutex2var_epi16(_mm512_loadu_si512(table + 2), bytes, _mm512_loadu_si512(table + 3));
    const __mmask32 is_high = _mm512_test_epi16_mask(bytes, _mm512_set1_epi16(64));
    const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(bytes, _mm512_set1_epi16(128)), 8);
    return _mm512_or_si512(_mm512_mask_blend_epi16(is_high, low, high), sign);
  }

  template <Kind kind>
  static INLINE Unit LoadUnit(const uint8_t* from) {
    if constexpr (kind == Kind::kInt4) return OfNibbles(from);
    else if constexpr (kind == Kind::kFp8) return OfFp8(from);
    else if constexpr (kind == Kind::kInt8)
      return (__m512i)_mm512_cvtne2ps_pbh((__m512)LoadFloats<kind>(from + 16), (__m512)LoadFloats<kind>(from));
    else return _mm512_loadu_si512(from);
  }

  static INLINE Sums Zero() { return _mm512_setzero_ps(); }
  static INLINE Floats Total(Sums sums) { return (Floats)sums; }
  static INLINE void MultiplyAdd(Sums& sums, Unit w, const uint16_t* x) {
    sums = Dot(sums, w, _mm512_loadu_si512(x));
  }

  // `from` and `second` are the rows of two inputs; for int4 one row has both.
  template <Kind kind>
  static INLINE Tile LoadTile(const uint8_t* from, const uint8_t* second, int) {
    if constexpr (kind == Kind::kInt4) {
      return {OfNibbles(from), OfNibbles(from + 16)};
    } else {
      static const uint16_t kInterleave[64] = {
          0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
          11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
          22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
      const __m512i first_half = _mm512_loadu_si512(kInterleave), second_half = _mm512_loadu_si512(kInterleave + 32);
      const __m512i a = LoadUnit<kind>(from), b = LoadUnit<kind>(second);
      return {_mm512_permutex2var_epi16(a, first_half, b), _mm512_permutex2var_epi16(a, second_half, b)};
    }
  }

  static INLINE void MultiplyAdd(Floats* sums, Tile w, const uint16_t* x) {
    const __m512i pair = _mm512_set1_epi32(Load<int32_t>(x));
    for (int i = 0; i < 2; ++i) sums[i] = (Floats)Dot((__m512)sums[i], w.v[i], pair);
  }
};
typedef Bfloat16 Mode;
