// Tensors as rows of T: half precision, strides.

namespace kaf {
namespace KAF_ISA {
namespace {

constexpr int kTile = 1024;                   // elements of one channel handled at a time
constexpr int kColumnTile = kHeld / kCopies;  // positions where channels are innermost, as their sums have one copy

template <class T> struct Buffers {
  static constexpr int kSize = std::max(kTile, (kColumnTile + 1) * kFloats);
  alignas(64) T x[kSize], grad[kSize], v_x[kSize], product[kTile], outputs[kMaxOutputs][kSize];
};

inline float to_float(uint16_t h, Type type) {
  uint32_t bits;
  float f;
  if (type == Type::bf16) {
    bits = static_cast<uint32_t>(h) << 16;
  } else {  // shift the half's exponent and mantissa into place; the product corrects the bias, for subnormals too
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    std::memcpy(&bits, &f, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  }
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t from_float(float f, Type type) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return static_cast<uint16_t>(bits >> 16 & 0x8000) | (type == Type::bf16 ? 0x7fc0 : 0x7e00);
  if (type == Type::bf16) return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const uint16_t sign = bits >> 16 & 0x8000;
  float magnitude = std::fabs(f);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {  // subnormal: the unit in the last place is 2^-24; adding 2^-1 rounds to it
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000);
  }
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000) >> 13);
}

template <class T> void load_run(Type type, const char* src, int64_t stride, T* dst, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    const double* s = reinterpret_cast<const double*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = s[i * stride];
  } else if (type == Type::f32) {
    const float* s = reinterpret_cast<const float*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = s[i * stride];
  } else {
    const uint16_t* s = reinterpret_cast<const uint16_t*>(src);
    int64_t i = 0;
#ifndef KAF_SCALAR
    if (stride == 1)
      for (; i + V::kWidth <= n; i += V::kWidth) V::store(dst + i, V::load_half(s + i, type));
#endif
    for (; i < n; ++i) dst[i] = to_float(s[i * stride], type);
  }
}

template <class T> void store_run(Type type, char* dst, int64_t stride, const T* src, int64_t n) {
  if constexpr (std::is_same_v<T, double>) {
    double* d = reinterpret_cast<double*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = src[i];
  } else if (type == Type::f32) {
    float* d = reinterpret_cast<float*>(dst);
    for (int64_t i = 0; i < n; ++i) d[i * stride] = src[i];
  } else {
    uint16_t* d = reinterpret_cast<uint16_t*>(dst);
    int64_t i = 0;
#ifndef KAF_SCALAR
    if (stride == 1)
      for (; i + V::kWidth <= n; i += V::kWidth) V::store_half(d + i, V::load(src + i), type);
#endif
    for (; i < n; ++i) d[i * stride] = from_float(src[i], type);
  }
}

// Calls f(offset in elements, index, length) for each stretch of positions [at, at + n) along the innermost dimension.
template <class F> void for_runs(const Plan& p, const View& v, int64_t at, int64_t n, F f) {
  const int inner = p.dims - 1;
  int64_t index[kMaxDims], rest = at;
  for (int i = inner; i >= 0; --i) {
    index[i] = rest % p.sizes[i];
    rest /= p.sizes[i];
  }
  for (int64_t done = 0; done < n;) {
    int64_t offset = 0;
    for (int i = 0; i <= inner; ++i) offset += index[i] * v.strides[i];
    const int64_t length = std::min(n - done, p.sizes[inner] - index[inner]);
    f(offset, done, length);
    done += length;
    index[inner] = 0;
    for (int i = inner - 1; i >= 0 && ++index[i] == p.sizes[i]; --i) index[i] = 0;
  }
}

template <class T> constexpr Type kNative = std::is_same_v<T, float> ? Type::f32 : Type::f64;

// Whether n positions from `at` lie in one run of unit stride, and also in T: then the loops work in place.
inline bool in_one_run(const Plan& p, const View& v, int64_t at, int64_t n) {
  const int inner = p.dims - 1;
  return v.strides[inner] == 1 && at % p.sizes[inner] + n <= p.sizes[inner];
}
template <class T> bool in_place(const Plan& p, const View& v, int64_t at, int64_t n) {
  return v.type == kNative<T> && in_one_run(p, v, at, n);
}

inline int64_t place_offset(const Plan& p, const View& v, int64_t at) {
  int64_t found = 0;
  for_runs(p, v, at, 1, [&](int64_t offset, int64_t, int64_t) { found = offset; });
  return found;
}

template <class T> T* place(const Plan& p, const View& v, int64_t c, int64_t at) {
  return reinterpret_cast<T*>(v.data) + c * v.channel_stride + place_offset(p, v, at);
}

template <class T> const T* load_row(const Plan& p, const View& v, int64_t c, int64_t at, int64_t n, T* buffer) {
  if (!v) return nullptr;
  if (in_place<T>(p, v, at, n)) return place<T>(p, v, c, at);
  const int bytes = size_of(v.type);
  for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
    load_run(v.type, v.data + (c * v.channel_stride + offset) * bytes, v.strides[p.dims - 1], buffer + i, length);
  });
  return buffer;
}

template <class T> void store_row(const Plan& p, const View& v, int64_t c, int64_t at, int64_t n, const T* buffer) {
  const int bytes = size_of(v.type);
  for_runs(p, v, at, n, [&](int64_t offset, int64_t i, int64_t length) {
    store_run(v.type, v.data + (c * v.channel_stride + offset) * bytes, v.strides[p.dims - 1], buffer + i, length);
  });
}

#ifndef KAF_SCALAR

inline V load_lanes(Type type, const char* p) {
  return type == Type::f32 ? V::load(reinterpret_cast<const float*>(p))
                           : V::load_half(reinterpret_cast<const uint16_t*>(p), type);
}

#endif

}  // namespace
}  // namespace KAF_ISA
}  // namespace kaf
