// Device arithmetic shared by the rasterizer's kernels. Everything that decides about a hit is rounded operation by operation
// (__f*_rn: no fused multiply-add), in the order of kernels/point_rasterizer/reference.py.
#pragma once

#include "raster.h"

namespace fvgen {

constexpr float kSlack = 0.01f;  // pixels; covers the rounding of a point's pixel coordinate, the exact test comes afterwards

struct Grid {
  float extent_x, extent_y;  // NDC length of the two sides
  float scale;               // pixels per NDC unit
  float radius2;             // NDC units squared, for hits
  float weight_radius2;      // the same, for weights: rounded once, after squaring
  float reach;               // pixels; no hit is farther away
};

inline Grid make_grid(int height, int width, double radius) {
  Grid g;
  g.extent_x = width > height ? (float(width) * 2.0f) / float(height) : 2.0f;
  g.extent_y = height > width ? (float(height) * 2.0f) / float(width) : 2.0f;
  g.scale = 0.5f * float(height < width ? height : width);
  g.radius2 = float(radius) * float(radius);
  g.weight_radius2 = float(radius * radius);
  g.reach = float(radius) * g.scale + kSlack;
  return g;
}

__device__ __forceinline__ float pixel_center(int i, int n, float extent) {
  const float half = 0.5f * extent;
  return __fadd_rn(-half, __fdiv_rn(__fadd_rn(__fmul_rn(extent, float(n - 1 - i)), half), float(n)));
}

__device__ __forceinline__ float squared_distance(float xf, float yf, float x, float y) {
  const float dx = __fsub_rn(xf, x), dy = __fsub_rn(yf, y);
  return __fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy));
}

// 1 - d2 / r2 with the quotient correctly rounded, as in the reference: a weight near 0 would show any other rounding. One Newton
// step on d2 * (1 / r2) is enough (Markstein 1990) and needs no slow path as a division does.
__device__ __forceinline__ float slot_weight(float d2, float r2, float inverse) {
  const float q = __fmul_rn(d2, inverse);
  return __fsub_rn(1.0f, __fmaf_rn(__fmaf_rn(-q, r2, d2), inverse, q));
}

__device__ __forceinline__ float dot3(const float* m, float x, float y, float z, float t) {
  return __fadd_rn(__fadd_rn(__fadd_rn(__fmul_rn(m[0], x), __fmul_rn(m[1], y)), __fmul_rn(m[2], z)), t);
}

__device__ __forceinline__ float3 to_camera(const float* cam, const float* p) {
  const float x = __ldg(p), y = __ldg(p + 1), z = __ldg(p + 2);
  return {dot3(cam, x, y, z, cam[9]), dot3(cam + 3, x, y, z, cam[10]), dot3(cam + 6, x, y, z, cam[11])};
}

// NDC x, NDC y, view depth of point i of view v.
template <bool kWorld>
__device__ __forceinline__ float3 load_ndc(const RasterCloud& cloud, int v, int i) {
  if constexpr (kWorld) {
    const float* cam = cloud.cameras + 16 * v;
    const float3 c = to_camera(cam, cloud.points + 3 * int64_t(i));
    return {__fadd_rn(cam[13], __fmul_rn(cam[12], __fdiv_rn(c.x, c.z))),
            __fadd_rn(cam[15], __fmul_rn(cam[14], __fdiv_rn(c.y, c.z))), c.z};
  } else {
    const float* p = cloud.points + 3 * (int64_t(v) * cloud.count + i);
    return {__ldg(p), __ldg(p + 1), __ldg(p + 2)};
  }
}

}  // namespace fvgen
