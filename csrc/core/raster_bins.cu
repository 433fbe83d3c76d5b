// Counting sort of the projected points by pixel cell: count, scan, scatter.
#include "raster_bins.cuh"

namespace fvgen {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kPerBlock = kThreads * kPerThread;

int scan_blocks(int64_t cells) { return int((cells + kPerBlock - 1) / kPerBlock); }

size_t align(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Cell of a point, -1 if it cannot hit any pixel. Points just outside are clamped to the border cells: clamping never moves a
// point away from a pixel, so the search window of a pixel still contains every point that can hit it.
__device__ __forceinline__ int cell_of(const float3& p, int height, int width, const Grid& g) {
  const float u = 0.5f * width - p.x * g.scale, v = 0.5f * height - p.y * g.scale;
  const float m = g.reach + 1.0f;
  if (!(p.z >= 0.0f && p.z < INFINITY && u > -m && u < width + m && v > -m && v < height + m)) return -1;
  const int col = min(max(int(floorf(u)), 0), width - 1);
  const int row = min(max(int(floorf(v)), 0), height - 1);
  return row * width + col;
}

template <bool kWorld>
__global__ void __launch_bounds__(kThreads) count_kernel(RasterCloud cloud, Grid grid, Bins bins) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int v = blockIdx.y;
  if (i >= cloud.count) return;
  const int cell = cell_of(load_ndc<kWorld>(cloud, v, int(i)), cloud.height, cloud.width, grid);
  const int64_t stride = int64_t(cloud.height) * cloud.width + 1;
  if (cell >= 0) atomicAdd(bins.start + v * stride + cell + 1, 1);
}

__device__ __forceinline__ int warp_inclusive(int x) {
  for (int d = 1; d < 32; d *= 2) {
    const int y = __shfl_up_sync(0xffffffffu, x, d);
    if ((threadIdx.x & 31) >= d) x += y;
  }
  return x;
}

// Exclusive sum of x over the block; *total receives the sum of all.
__device__ __forceinline__ int block_exclusive(int x, int* total) {
  __shared__ int warps[kThreads / 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int inclusive = warp_inclusive(x);
  __syncthreads();  // the array may still be read from an earlier call
  if (lane == 31) warps[warp] = inclusive;
  __syncthreads();
  int before = 0, all = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warps[w];
    all += warps[w];
  }
  *total = all;
  return before + inclusive - x;
}

__global__ void __launch_bounds__(kThreads) partial_kernel(Bins bins, int64_t cells) {
  const int* in = bins.start + blockIdx.y * (cells + 1) + 1;
  const int64_t base = int64_t(blockIdx.x) * kPerBlock;
  int sum = 0;
  for (int j = 0; j < kPerThread; ++j) {
    const int64_t c = base + j * kThreads + threadIdx.x;
    if (c < cells) sum += in[c];
  }
  int total;
  block_exclusive(sum, &total);
  if (threadIdx.x == 0) bins.partial[int64_t(blockIdx.y) * gridDim.x + blockIdx.x] = total;
}

// Turns the counts in start[1 ..] into exclusive sums, in place.
__global__ void __launch_bounds__(kThreads) scan_kernel(Bins bins, int64_t cells) {
  const int* partial = bins.partial + int64_t(blockIdx.y) * gridDim.x;
  int before = 0, base;
  for (int b = threadIdx.x; b < blockIdx.x; b += kThreads) before += partial[b];
  block_exclusive(before, &base);

  int* data = bins.start + blockIdx.y * (cells + 1) + 1;
  const int64_t first = int64_t(blockIdx.x) * kPerBlock + threadIdx.x * kPerThread;
  int value[kPerThread];
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    value[j] = first + j < cells ? data[first + j] : 0;
    sum += value[j];
  }
  int total;
  int at = base + block_exclusive(sum, &total);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if (first + j < cells) data[first + j] = at;
    at += value[j];
  }
}

// Moves every point to its cell. The cursor of cell c is start[c + 1]; when all are placed it has become the start of cell c + 1.
template <bool kWorld>
__global__ void __launch_bounds__(kThreads) scatter_kernel(RasterCloud cloud, Grid grid, Bins bins) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int v = blockIdx.y;
  if (i >= cloud.count) return;
  const float3 p = load_ndc<kWorld>(cloud, v, int(i));
  const int cell = cell_of(p, cloud.height, cloud.width, grid);
  if (cell < 0) return;
  const int64_t stride = int64_t(cloud.height) * cloud.width + 1;
  const int at = atomicAdd(bins.start + v * stride + cell + 1, 1);
  bins.records[int64_t(v) * cloud.count + at] = {p.x, p.y, p.z + 0.0f, __int_as_float(int(i))};  // + 0 turns -0 into 0
}

}  // namespace

size_t layout_bins(int views, int count, int height, int width, void* workspace, Bins* bins) {
  const int64_t cells = int64_t(height) * width;
  const size_t records = align(size_t(views) * count * sizeof(float4));
  const size_t start = align(size_t(views) * (cells + 1) * sizeof(int));
  const size_t partial = align(size_t(views) * scan_blocks(cells) * sizeof(int));
  if (bins != nullptr) {
    char* base = static_cast<char*>(workspace);
    bins->records = reinterpret_cast<float4*>(base);
    bins->start = reinterpret_cast<int*>(base + records);
    bins->partial = reinterpret_cast<int*>(base + records + start);
  }
  return records + start + partial;
}

cudaError_t fill_bins(const RasterCloud& cloud, const Grid& grid, const Bins& bins, cudaStream_t stream) {
  const int64_t cells = int64_t(cloud.height) * cloud.width;
  const size_t bytes = size_t(cloud.views) * (cells + 1) * sizeof(int);
  if (cudaError_t error = cudaMemsetAsync(bins.start, 0, bytes, stream); error != cudaSuccess) return error;
  if (cloud.count == 0) return cudaSuccess;
  const dim3 points(unsigned((int64_t(cloud.count) + kThreads - 1) / kThreads), cloud.views);
  const dim3 blocks(scan_blocks(cells), cloud.views);
  if (cloud.cameras != nullptr) {
    count_kernel<true><<<points, kThreads, 0, stream>>>(cloud, grid, bins);
  } else {
    count_kernel<false><<<points, kThreads, 0, stream>>>(cloud, grid, bins);
  }
  partial_kernel<<<blocks, kThreads, 0, stream>>>(bins, cells);
  scan_kernel<<<blocks, kThreads, 0, stream>>>(bins, cells);
  if (cloud.cameras != nullptr) {
    scatter_kernel<true><<<points, kThreads, 0, stream>>>(cloud, grid, bins);
  } else {
    scatter_kernel<false><<<points, kThreads, 0, stream>>>(cloud, grid, bins);
  }
  return cudaGetLastError();
}

}  // namespace fvgen
