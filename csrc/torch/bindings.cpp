// torch.ops.fvgen_cuda.*: unpacks and checks tensors, fills the parameter structs, takes torch's current stream and launches.
// Uses PyTorch's stable ABI only, so one binary serves many PyTorch versions. The Python side allocates every buffer.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "core/raster.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not named directly: a library that needs this symbol would not load where PyTorch has no CUDA.
cudaStream_t current_stream(const Tensor& t) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "fvgen: this PyTorch has no CUDA streams; install a CUDA build of PyTorch");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(t.get_device_index(), &stream) == 0, "fvgen: cannot get the current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "fvgen: ", what, " failed: ", cudaGetErrorString(error));
}

void check(const Tensor& t, const char* name, ScalarType type, int64_t dim) {
  STD_TORCH_CHECK(t.is_cuda() && t.is_contiguous(), name, " must be a contiguous CUDA tensor");
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
}

const float* floats(const Tensor& t, const char* name, int64_t dim) {
  check(t, name, ScalarType::Float, dim);
  return static_cast<const float*>(t.data_ptr());
}

float* out_floats(const Tensor& t, const char* name, int64_t dim) { return const_cast<float*>(floats(t, name, dim)); }

int32_t* ints(const Tensor& t, const char* name, int64_t dim) {
  check(t, name, ScalarType::Int, dim);
  return static_cast<int32_t*>(t.data_ptr());
}

int narrow(int64_t n, const char* name) {
  STD_TORCH_CHECK(n >= 0 && n <= INT32_MAX, name, " must fit in 31 bits, got ", n);
  return int(n);
}

// images is any [V, H, W, ...] tensor.
fvgen::RasterCloud ndc_cloud(const Tensor& points, const Tensor& images, double radius) {
  fvgen::RasterCloud cloud{};
  cloud.points = floats(points, "points_ndc [V, P, 3]", 3);
  STD_TORCH_CHECK(points.size(2) == 3 && points.size(0) == images.size(0), "points_ndc must have shape [V, P, 3]");
  cloud.views = narrow(points.size(0), "V");
  cloud.count = narrow(points.size(1), "P");
  cloud.height = narrow(images.size(1), "H");
  cloud.width = narrow(images.size(2), "W");
  cloud.radius = radius;
  return cloud;
}

fvgen::RasterCloud world_cloud(const Tensor& points, const Tensor& cameras, const Tensor& images, double radius) {
  fvgen::RasterCloud cloud{};
  cloud.points = floats(points, "points [P, 3]", 2);
  cloud.cameras = floats(cameras, "cameras [V, 16]", 2);
  STD_TORCH_CHECK(points.size(1) == 3, "points must have shape [P, 3]");
  STD_TORCH_CHECK(cameras.size(1) == 16 && cameras.size(0) == images.size(0), "cameras must have shape [V, 16]");
  cloud.views = narrow(cameras.size(0), "V");
  cloud.count = narrow(points.size(0), "P");
  cloud.height = narrow(images.size(1), "H");
  cloud.width = narrow(images.size(2), "W");
  cloud.radius = radius;
  return cloud;
}

fvgen::RasterBlend make_blend(const Tensor& features, const std::optional<Tensor>& background, const Tensor& image, bool norm) {
  fvgen::RasterBlend blend{};
  blend.features = floats(features, "features [R, C]", 2);
  blend.rows = narrow(features.size(0), "R");
  blend.channels = narrow(features.size(1), "C");
  blend.norm = norm;
  STD_TORCH_CHECK(image.size(3) == features.size(1), "the image must have the channels of features [R, C]");
  if (background.has_value()) {
    blend.background = floats(*background, "background [C]", 1);
    STD_TORCH_CHECK(background->size(0) == features.size(1), "background must have shape [C]");
  }
  return blend;
}

void check_fragments(const Tensor& t, const Tensor& like, const char* name) {
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(t.dim() == 4 && t.size(d) == like.size(d), name, " must have the shape [V, H, W, K] of idx");
}

int64_t workspace_bytes(Tensor points, int64_t views, int64_t height, int64_t width) {
  const size_t bytes = fvgen::raster_workspace_bytes(narrow(views, "V"), narrow(points.size(points.dim() - 2), "P"),
                                                     narrow(height, "H"), narrow(width, "W"));
  STD_TORCH_CHECK(bytes > 0, "fvgen: the problem is too large: V < 65536, V * P < 2^31 and H * W < 2^31 are needed");
  return int64_t(bytes);
}

void fragments(Tensor points, double radius, Tensor workspace, Tensor idx, Tensor zbuf, Tensor dists2) {
  check_fragments(zbuf, idx, "zbuf");
  check_fragments(dists2, idx, "dists2");
  const fvgen::RasterFragments out{ints(idx, "idx", 4), out_floats(zbuf, "zbuf", 4), out_floats(dists2, "dists2", 4),
                                   narrow(idx.size(3), "K")};
  check_launch(fvgen::raster_fragments(ndc_cloud(points, idx, radius), out, workspace.data_ptr(), size_t(workspace.numel()),
                                       current_stream(points)),
               "raster_fragments");
}

void render(Tensor points, Tensor features, Tensor cameras, std::optional<Tensor> background, double radius, int64_t slots,
            bool norm, Tensor workspace, Tensor image, Tensor depth, Tensor idx) {
  fvgen::RasterFragments out{};
  out.slots = narrow(slots, "K");
  if (idx.size(3) != 0) {
    STD_TORCH_CHECK(idx.size(3) == slots, "idx must have shape [V, H, W, K] or [V, H, W, 0]");
    out.idx = ints(idx, "idx", 4);
  }
  check_launch(fvgen::raster_render(world_cloud(points, cameras, image, radius), make_blend(features, background, image, norm), out,
                                    out_floats(image, "image", 4), out_floats(depth, "depth", 3), workspace.data_ptr(),
                                    size_t(workspace.numel()), current_stream(points)),
               "raster_render");
}

void composite(Tensor idx, Tensor dists2, Tensor features, std::optional<Tensor> background, double radius, bool norm,
               Tensor image) {
  check_fragments(dists2, idx, "dists2");
  check_launch(fvgen::raster_composite(ints(idx, "idx", 4), floats(dists2, "dists2", 4), idx.size(0) * idx.size(1) * idx.size(2),
                                       narrow(idx.size(3), "K"), make_blend(features, background, image, norm), radius,
                                       out_floats(image, "image", 4), current_stream(idx)),
               "raster_composite");
}

void fragments_backward(Tensor points, Tensor idx, Tensor grad_zbuf, Tensor grad_dists2, Tensor grad_points) {
  check_fragments(grad_zbuf, idx, "grad_zbuf");
  check_fragments(grad_dists2, idx, "grad_dists2");
  check_launch(fvgen::raster_fragments_backward(ndc_cloud(points, idx, 1.0), ints(idx, "idx", 4), narrow(idx.size(3), "K"),
                                                floats(grad_zbuf, "grad_zbuf", 4), floats(grad_dists2, "grad_dists2", 4),
                                                out_floats(grad_points, "grad_points", 3), current_stream(points)),
               "raster_fragments_backward");
}

void composite_backward(Tensor grad_image, Tensor idx, Tensor dists2, Tensor features, double radius, bool norm,
                        Tensor grad_dists2, Tensor grad_features) {
  check_fragments(dists2, idx, "dists2");
  check_fragments(grad_dists2, idx, "grad_dists2");
  check_launch(
      fvgen::raster_composite_backward(floats(grad_image, "grad_image", 4), ints(idx, "idx", 4), floats(dists2, "dists2", 4),
                                       idx.size(0) * idx.size(1) * idx.size(2), narrow(idx.size(3), "K"),
                                       make_blend(features, std::nullopt, grad_image, norm), radius,
                                       out_floats(grad_dists2, "grad_dists2", 4), out_floats(grad_features, "grad_features", 2),
                                       current_stream(idx)),
      "raster_composite_backward");
}

void render_backward(Tensor grad_image, Tensor grad_depth, Tensor points, Tensor features, Tensor cameras, Tensor idx,
                     double radius, bool norm, Tensor grad_points, Tensor grad_features) {
  check_launch(fvgen::raster_render_backward(world_cloud(points, cameras, idx, radius),
                                             make_blend(features, std::nullopt, grad_image, norm),
                                             floats(grad_image, "grad_image", 4), floats(grad_depth, "grad_depth", 3),
                                             ints(idx, "idx", 4), narrow(idx.size(3), "K"),
                                             out_floats(grad_points, "grad_points", 2),
                                             out_floats(grad_features, "grad_features", 2), current_stream(points)),
               "raster_render_backward");
}

}  // namespace

STABLE_TORCH_LIBRARY(fvgen_cuda, m) {
  m.def("raster_workspace_bytes(Tensor points, int views, int height, int width) -> int");
  m.def("raster_fragments(Tensor points, float radius, Tensor(a!) workspace, Tensor(b!) idx, Tensor(c!) zbuf, Tensor(d!) dists2) -> ()");
  m.def(
      "raster_render(Tensor points, Tensor features, Tensor cameras, Tensor? background, float radius, int slots, bool norm, "
      "Tensor(a!) workspace, Tensor(b!) image, Tensor(c!) depth, Tensor(d!) idx) -> ()");
  m.def(
      "raster_composite(Tensor idx, Tensor dists2, Tensor features, Tensor? background, float radius, bool norm, "
      "Tensor(a!) image) -> ()");
  m.def("raster_fragments_backward(Tensor points, Tensor idx, Tensor grad_zbuf, Tensor grad_dists2, Tensor(a!) grad_points) -> ()");
  m.def(
      "raster_composite_backward(Tensor grad_image, Tensor idx, Tensor dists2, Tensor features, float radius, bool norm, "
      "Tensor(a!) grad_dists2, Tensor(b!) grad_features) -> ()");
  m.def(
      "raster_render_backward(Tensor grad_image, Tensor grad_depth, Tensor points, Tensor features, Tensor cameras, Tensor idx, "
      "float radius, bool norm, Tensor(a!) grad_points, Tensor(b!) grad_features) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fvgen_cuda, CUDA, m) {
  m.impl("raster_workspace_bytes", TORCH_BOX(&workspace_bytes));
  m.impl("raster_fragments", TORCH_BOX(&fragments));
  m.impl("raster_render", TORCH_BOX(&render));
  m.impl("raster_composite", TORCH_BOX(&composite));
  m.impl("raster_fragments_backward", TORCH_BOX(&fragments_backward));
  m.impl("raster_composite_backward", TORCH_BOX(&composite_backward));
  m.impl("raster_render_backward", TORCH_BOX(&render_backward));
}
