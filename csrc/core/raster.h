// Point rasterizer: K nearest points per pixel, blending, and gradients. No framework, no allocation, no synchronisation:
// raw device pointers in, cudaError_t out, so every call can be captured in a CUDA graph. Rules: kernels/point_rasterizer/README.md.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fvgen {

constexpr int kMaxSlots = 64;

struct RasterCloud {
  const float* points;   // cameras != null: [P, 3] world units; else [V, P, 3] NDC x, NDC y, view depth
  const float* cameras;  // [V, 16] rotation cam_from_world (9), translation (3), sx, ox, sy, oy; or null
  int views;             // V
  int count;             // P, points per view; V * P < 2^31
  int height, width;     // pixels
  double radius;         // disc radius, NDC units
};

struct RasterFragments {
  int32_t* idx;   // [V, H, W, K] v * P + p, -1 = empty; may be null
  float* zbuf;    // [V, H, W, K] view depth; may be null
  float* dists2;  // [V, H, W, K] squared NDC distance; may be null
  int slots;      // K, 1..kMaxSlots
};

struct RasterBlend {
  const float* features;    // [rows, C]
  const float* background;  // [C] or null
  int rows;                 // slot index i uses row i mod rows
  int channels;             // C
  bool norm;                // normalised weights instead of front-to-back alpha
};

// Bytes of workspace for raster_fragments and raster_render; exact for every radius and any density of points. 0 = too large.
size_t raster_workspace_bytes(int views, int count, int height, int width);

cudaError_t raster_fragments(const RasterCloud&, const RasterFragments& out, void* workspace, size_t bytes, cudaStream_t);

// image [V, H, W, C]; depth [V, H, W] of the nearest point, 0 where nothing was hit. Fragment pointers may be null.
// blend.rows must be cloud.count.
cudaError_t raster_render(const RasterCloud&, const RasterBlend&, const RasterFragments& out, float* image, float* depth,
                          void* workspace, size_t bytes, cudaStream_t);

// idx and dists2 are read; image [V, H, W, C] is written.
cudaError_t raster_composite(const int32_t* idx, const float* dists2, int64_t pixels, int slots, const RasterBlend&, double radius,
                             float* image, cudaStream_t);

// Every gradient buffer below that is scattered into (points, features) must be zeroed by the caller; sums are atomic.
cudaError_t raster_fragments_backward(const RasterCloud&, const int32_t* idx, int slots, const float* grad_zbuf,
                                      const float* grad_dists2, float* grad_points, cudaStream_t);

// grad_dists2 [V, H, W, K] is overwritten, grad_features [rows, C] is added to.
cudaError_t raster_composite_backward(const float* grad_image, const int32_t* idx, const float* dists2, int64_t pixels, int slots,
                                      const RasterBlend&, double radius, float* grad_dists2, float* grad_features, cudaStream_t);

// grad_points [P, 3] in world units and grad_features [P, C] are added to; points whose 1/depth is not finite get nothing.
cudaError_t raster_render_backward(const RasterCloud&, const RasterBlend&, const float* grad_image, const float* grad_depth,
                                   const int32_t* idx, int slots, float* grad_points, float* grad_features, cudaStream_t);

}  // namespace fvgen
