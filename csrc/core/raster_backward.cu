// Gradients of the rasterizer: from the image to the fragments' weights, and from there to features and points.
#include "raster_common.cuh"

namespace fvgen {
namespace {

constexpr int kThreads = 64;  // 64 slots * 3 values * 64 threads = 48 KiB of shared memory

struct BackwardParams {
  RasterCloud cloud;  // unused without points
  Grid grid;
  RasterBlend blend;
  const int32_t* idx;       // [pixels, K]
  const float* dists2;      // [pixels, K]; null = recomputed from the points
  const float* grad_image;  // [pixels, C]
  const float* grad_depth;  // [pixels]; only with points
  float* grad_dists2;       // [pixels, K]; only without points
  float* grad_points;       // [P, 3]; only with points
  float* grad_features;     // [rows, C]
  int64_t pixels;
  int slots;
};

// Adds the gradient of one fragment to its world point: (gx, gy) belong to NDC, gz to the view depth.
__device__ __forceinline__ void add_world(const RasterCloud& cloud, const float* cam, int i, float gx, float gy, float gz,
                                          float* grad_points) {
  const float3 c = to_camera(cam, cloud.points + 3 * int64_t(i));
  const float inverse = 1.0f / c.z;
  if (!(fabsf(inverse) < INFINITY)) return;
  const float x = gx * cam[12] * inverse, y = gy * cam[14] * inverse;
  const float z = gz - (x * (c.x / c.z) + y * (c.y / c.z));
  float* out = grad_points + 3 * int64_t(i);
#pragma unroll
  for (int a = 0; a < 3; ++a) atomicAdd(out + a, x * cam[a] + y * cam[3 + a] + z * cam[6 + a]);
}

// One thread per pixel. Per slot: w weight, t transmittance in front (norm: unused), dot = <upstream, feature>.
template <bool kPoints>
__global__ void __launch_bounds__(kThreads) blend_backward_kernel(BackwardParams p) {
  extern __shared__ float shared[];
  const int64_t pixel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pixel >= p.pixels) return;
  const int slots = p.slots, channels = p.blend.channels;
  float* w_k = shared + threadIdx.x;
  float* t_k = w_k + slots * kThreads;
  float* dot_k = t_k + slots * kThreads;

  int v = 0;
  float xf = 0.0f, yf = 0.0f;
  if constexpr (kPoints) {
    const int64_t size = int64_t(p.cloud.height) * p.cloud.width;
    v = int(pixel / size);
    const int in_view = int(pixel % size);
    xf = pixel_center(in_view % p.cloud.width, p.cloud.width, p.grid.extent_x);
    yf = pixel_center(in_view / p.cloud.width, p.cloud.height, p.grid.extent_y);
  }
  const int first = kPoints ? v * p.cloud.count : 0;
  const int32_t* idx = p.idx + pixel * slots;
  const float* g = p.grad_image + pixel * channels;
  const float inverse = 1.0f / p.grid.weight_radius2;

  float transmittance = 1.0f;
  double total = 0.0, weighted = 0.0;  // their products nearly cancel where one slot holds all the weight
  int used = 0;
  for (; used < slots && idx[used] >= 0; ++used) {  // empty slots are at the end
    const int k = used, i = idx[k] - first;
    float d2;
    if constexpr (kPoints) {
      const float3 at = load_ndc<true>(p.cloud, v, i);
      d2 = squared_distance(xf, yf, at.x, at.y);
    } else {
      d2 = p.dists2[pixel * slots + k];
    }
    const float w = slot_weight(d2, p.grid.weight_radius2, inverse);
    const float* f = p.blend.features + int64_t(i % p.blend.rows) * channels;
    float dot = 0.0f;
    for (int c = 0; c < channels; ++c) dot += g[c] * __ldg(f + c);
    w_k[k * kThreads] = w;
    t_k[k * kThreads] = transmittance;
    dot_k[k * kThreads] = dot;
    transmittance *= 1.0f - w;
    total += w;
    weighted += double(w) * dot;
  }
  total = fmax(total, 1e-4);

  float behind = 0.0f;  // colour behind slot k as seen from k: sum over j > k of w_j dot_j prod of (1 - w) between them
  for (int k = used - 1; k >= 0; --k) {
    const int i = idx[k] - first;
    const float w = w_k[k * kThreads], t = t_k[k * kThreads], dot = dot_k[k * kThreads];
    float grad_w, share;
    if (p.blend.norm) {
      share = float(w / total);
      grad_w = float((dot * total - weighted) / (total * total));
    } else {
      share = w * t;
      grad_w = t * (dot - (1.0f - w) * behind / (1.0f - w + 1e-9f));
      behind = w * dot + (1.0f - w) * behind;
    }
    float* gf = p.grad_features + int64_t(i % p.blend.rows) * channels;
    for (int c = 0; c < channels; ++c) atomicAdd(gf + c, share * g[c]);
    const float grad_d2 = -grad_w * inverse;
    if constexpr (kPoints) {
      const float3 at = load_ndc<true>(p.cloud, v, i);
      const float gz = k == 0 ? p.grad_depth[pixel] : 0.0f;
      add_world(p.cloud, p.cloud.cameras + 16 * v, i, 2.0f * grad_d2 * (at.x - xf), 2.0f * grad_d2 * (at.y - yf), gz,
                p.grad_points);
    } else {
      p.grad_dists2[pixel * slots + k] = grad_d2;
    }
  }
  if constexpr (!kPoints) {
    for (int k = used; k < slots; ++k) p.grad_dists2[pixel * slots + k] = 0.0f;
  }
}

template <bool kPoints>
cudaError_t blend_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.slots < 1 || p.slots > kMaxSlots) return cudaErrorInvalidValue;
  if (p.pixels == 0) return cudaSuccess;
  const size_t shared = size_t(p.slots) * 3 * kThreads * sizeof(float);
  const unsigned blocks = unsigned((p.pixels + kThreads - 1) / kThreads);
  blend_backward_kernel<kPoints><<<blocks, kThreads, shared, stream>>>(p);
  return cudaGetLastError();
}

// One thread per slot.
__global__ void __launch_bounds__(256) fragments_backward_kernel(RasterCloud cloud, Grid grid, const int32_t* idx, int slots,
                                                                 int64_t total, const float* grad_zbuf, const float* grad_dists2,
                                                                 float* grad_points) {
  const int64_t slot = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (slot >= total) return;
  const int i = idx[slot];
  if (i < 0) return;
  const int in_view = int(slot / slots % (int64_t(cloud.height) * cloud.width));
  const float* p = cloud.points + 3 * int64_t(i);
  const float g = 2.0f * grad_dists2[slot];
  float* out = grad_points + 3 * int64_t(i);
  atomicAdd(out, g * (p[0] - pixel_center(in_view % cloud.width, cloud.width, grid.extent_x)));
  atomicAdd(out + 1, g * (p[1] - pixel_center(in_view / cloud.width, cloud.height, grid.extent_y)));
  atomicAdd(out + 2, grad_zbuf[slot]);
}

}  // namespace

cudaError_t raster_fragments_backward(const RasterCloud& cloud, const int32_t* idx, int slots, const float* grad_zbuf,
                                      const float* grad_dists2, float* grad_points, cudaStream_t stream) {
  if (cloud.cameras != nullptr) return cudaErrorInvalidValue;
  const int64_t total = int64_t(cloud.views) * cloud.height * cloud.width * slots;
  if (total == 0) return cudaSuccess;
  const Grid grid = make_grid(cloud.height, cloud.width, 1.0f);  // the radius does not matter here
  fragments_backward_kernel<<<unsigned((total + 255) / 256), 256, 0, stream>>>(cloud, grid, idx, slots, total, grad_zbuf,
                                                                               grad_dists2, grad_points);
  return cudaGetLastError();
}

cudaError_t raster_composite_backward(const float* grad_image, const int32_t* idx, const float* dists2, int64_t pixels, int slots,
                                      const RasterBlend& blend, double radius, float* grad_dists2, float* grad_features,
                                      cudaStream_t stream) {
  BackwardParams p{};
  p.grid.weight_radius2 = float(radius * radius);
  p.blend = blend;
  p.idx = idx;
  p.dists2 = dists2;
  p.grad_image = grad_image;
  p.grad_dists2 = grad_dists2;
  p.grad_features = grad_features;
  p.pixels = pixels;
  p.slots = slots;
  return blend_backward<false>(p, stream);
}

cudaError_t raster_render_backward(const RasterCloud& cloud, const RasterBlend& blend, const float* grad_image,
                                   const float* grad_depth, const int32_t* idx, int slots, float* grad_points,
                                   float* grad_features, cudaStream_t stream) {
  if (cloud.cameras == nullptr || blend.rows != cloud.count) return cudaErrorInvalidValue;
  BackwardParams p{};
  p.cloud = cloud;
  p.grid = make_grid(cloud.height, cloud.width, cloud.radius);
  p.blend = blend;
  p.idx = idx;
  p.grad_image = grad_image;
  p.grad_depth = grad_depth;
  p.grad_points = grad_points;
  p.grad_features = grad_features;
  p.pixels = int64_t(cloud.views) * cloud.height * cloud.width;
  p.slots = slots;
  return blend_backward<true>(p, stream);
}

}  // namespace fvgen
