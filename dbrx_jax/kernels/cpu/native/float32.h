// Multiplication in float32: weights of all kinds are converted in registers.

struct Float32 {
  static constexpr Kind kFirstKind = Kind::kFloat32;
  static constexpr int kStep = 2 * kLanes;  // inputs of a Unit
  static constexpr int kMaxRows = kLanes / 4, kSums = kLanes;  // what registers can hold
  static constexpr int kInputs = 1, kColumns = kLanes;  // of a Tile
  static constexpr int kTiles = kLanes == 16 ? 16 : 8;  // in registers

  typedef float Element;
  struct Unit {
    Floats a, b;  // the first and the second half of kStep inputs, or for int4 the even and the odd ones
  };
  typedef Floats Sums;
  struct Tile {
    Floats v[1];  // an input's weights for kColumns outputs
  };

  static INLINE float ToElement(float x) { return x; }

  static INLINE int64_t Position(Kind kind, int64_t c) {
    const int64_t i = c % kStep;
    return kind == Kind::kInt4 ? c - i + i / 2 + (i % 2) * kLanes : c;
  }

  template <Kind kind>
  static INLINE Unit LoadUnit(const uint8_t* from) {
    if constexpr (kind == Kind::kInt4) return {LowNibbles(from), HighNibbles(from)};
    else return {LoadFloats<kind>(from), LoadFloats<kind>(from + BytesOf(kind, kLanes))};
  }

  static INLINE Sums Zero() { return Sums{}; }
  static INLINE Floats Total(Sums sums) { return sums; }

  static INLINE void MultiplyAdd(Sums& sums, Unit w, const float* x) {
    sums += Load<Floats>(x) * w.a;
    sums += Load<Floats>(x + kLanes) * w.b;
  }

  // `from` is the row of the input, or for int4 that of input and its neighbour.
  template <Kind kind>
  static INLINE Tile LoadTile(const uint8_t* from, const uint8_t*, int input) {
    if constexpr (kind == Kind::kInt4) return {input % 2 ? HighNibbles(from) : LowNibbles(from)};
    else return {LoadFloats<kind>(from)};
  }

  static INLINE void MultiplyAdd(Floats* sums, Tile w, const float* x) { sums[0] += *x * w.v[0]; }
};
typedef Float32 Mode;
