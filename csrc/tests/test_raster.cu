// Rasterizer against a brute force on the host: fragments bit for bit, images and gradients within rounding.
// Exit status: 0 passed, 1 failed, 77 no CUDA device (skipped). Small enough for compute-sanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/raster.h"

using namespace fvgen;

namespace {

int failures = 0;

#define CHECK(condition, ...)                     \
  do {                                            \
    if (!(condition)) {                           \
      ++failures;                                 \
      std::printf("FAILED %s:%d ", __FILE__, __LINE__); \
      std::printf(__VA_ARGS__);                   \
      std::printf("\n");                          \
    }                                             \
  } while (0)

void cuda(cudaError_t error) {
  if (error != cudaSuccess) {
    std::printf("CUDA error: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
}

template <typename T>
struct Device {
  T* data = nullptr;
  size_t size = 0;
  explicit Device(size_t n, int fill = 0xff) : size(n) {  // bytes 0xff are NaN: an unwritten output shows
    cuda(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)));
    cuda(cudaMemset(data, fill, std::max<size_t>(n, 1) * sizeof(T)));
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    cuda(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> out(size);
    cuda(cudaMemcpy(out.data(), data, size * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

template <typename T>
T center(int i, int n, int other) {
  const T extent = n > other ? (T(n) * T(2)) / T(other) : T(2);
  const T half = extent / 2;
  return -half + (extent * T(n - 1 - i) + half) / T(n);
}

template <typename T>
void project(const T* cam, const T* p, T* ndc) {
  T c[3];
  for (int a = 0; a < 3; ++a) c[a] = ((cam[3 * a] * p[0] + cam[3 * a + 1] * p[1]) + cam[3 * a + 2] * p[2]) + cam[9 + a];
  ndc[0] = cam[13] + cam[12] * (c[0] / c[2]);
  ndc[1] = cam[15] + cam[14] * (c[1] / c[2]);
  ndc[2] = c[2];
}

struct Scene {
  std::string name;
  int views, count, height, width, slots, channels;
  float radius;
  bool norm = false, ties = false, dense = false, background = false;
};

template <typename T>
struct Fragments {
  std::vector<int> idx;
  std::vector<T> zbuf, dists2;
};

template <typename T>
Fragments<T> brute_force(const Scene& s, const std::vector<T>& ndc) {
  const size_t size = size_t(s.views) * s.height * s.width * s.slots;
  Fragments<T> out{std::vector<int>(size, -1), std::vector<T>(size, T(-1)), std::vector<T>(size, T(-1))};
  const T radius2 = T(s.radius) * T(s.radius);
  struct Hit {
    T z;
    int i;
    T d2;
  };
  std::vector<Hit> hits;
  for (int v = 0; v < s.views; ++v)
    for (int r = 0; r < s.height; ++r)
      for (int c = 0; c < s.width; ++c) {
        const T x = center<T>(c, s.width, s.height), y = center<T>(r, s.height, s.width);
        hits.clear();
        for (int i = 0; i < s.count; ++i) {
          const T* p = &ndc[3 * (size_t(v) * s.count + i)];
          const T dx = x - p[0], dy = y - p[1];
          const T xx = dx * dx, yy = dy * dy, d2 = xx + yy;
          if (p[2] >= 0 && p[2] < INFINITY && d2 < radius2) hits.push_back({p[2], i, d2});
        }
        std::sort(hits.begin(), hits.end(), [](const Hit& a, const Hit& b) { return a.z != b.z ? a.z < b.z : a.i < b.i; });
        const size_t base = ((size_t(v) * s.height + r) * s.width + c) * s.slots;
        for (size_t k = 0; k < hits.size() && k < size_t(s.slots); ++k) {
          out.idx[base + k] = v * s.count + hits[k].i;
          out.zbuf[base + k] = hits[k].z;
          out.dists2[base + k] = hits[k].d2;
        }
      }
  return out;
}

template <typename T>
std::vector<T> blend(const Scene& s, const Fragments<T>& f, const std::vector<T>& features, const std::vector<T>& background) {
  const size_t pixels = f.idx.size() / s.slots;
  std::vector<T> image(pixels * s.channels, T(0));
  for (size_t p = 0; p < pixels; ++p) {
    T transmittance = 1, total = 0;
    for (int k = 0; k < s.slots; ++k) {
      const int i = f.idx[p * s.slots + k];
      if (i < 0) break;
      const T w = 1 - f.dists2[p * s.slots + k] / (T(s.radius) * T(s.radius));
      const T share = s.norm ? w : w * transmittance;
      transmittance *= 1 - w;
      total += w;
      for (int c = 0; c < s.channels; ++c) image[p * s.channels + c] += share * features[size_t(i % s.count) * s.channels + c];
    }
    for (int c = 0; c < s.channels; ++c) {
      if (s.norm) image[p * s.channels + c] /= std::max(total, T(1e-4));
      if (!background.empty() && f.idx[p * s.slots] < 0) image[p * s.channels + c] = background[c];
    }
  }
  return image;
}

// All of it in T: world points to image and depth of the nearest point.
template <typename T>
std::vector<T> render(const Scene& s, const std::vector<T>& points, const std::vector<T>& cams, const std::vector<T>& features,
                      std::vector<T>* depth) {
  std::vector<T> ndc(size_t(s.views) * s.count * 3);
  for (int v = 0; v < s.views; ++v)
    for (int i = 0; i < s.count; ++i) project(&cams[16 * v], &points[3 * i], &ndc[3 * (size_t(v) * s.count + i)]);
  const Fragments<T> f = brute_force(s, ndc);
  depth->resize(f.idx.size() / s.slots);
  for (size_t p = 0; p < depth->size(); ++p) (*depth)[p] = f.idx[p * s.slots] < 0 ? T(0) : f.zbuf[p * s.slots];
  return blend(s, f, features, {});
}

template <typename T>
double largest_error(const std::vector<T>& a, const std::vector<double>& b) {
  double error = 0, scale = 1e-30;
  for (size_t i = 0; i < a.size(); ++i) {
    const double e = std::fabs(double(a[i]) - b[i]);
    error = e <= error ? error : e;  // NaN wins
    scale = std::max(scale, std::fabs(b[i]));
  }
  return error / scale;
}

std::vector<double> widen(const std::vector<float>& x) { return {x.begin(), x.end()}; }

std::vector<float> cameras(const Scene& s) {
  std::vector<float> out;
  const float half = 0.5f * std::min(s.height, s.width);
  for (int v = 0; v < s.views; ++v) {
    const float a = 0.2f * (v - 0.5f * (s.views - 1)), c = std::cos(a), n = std::sin(a);
    const float lens = -0.8f * s.width / half;
    for (float x : {c, 0.0f, n, 0.0f, 1.0f, 0.0f, -n, 0.0f, c, 0.02f * v, 0.0f, 2.0f, lens, 0.03f, lens, -0.02f}) out.push_back(x);
  }
  return out;
}

std::vector<float> cloud_ndc(const Scene& s, std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  const float side = float(std::min(s.height, s.width));
  std::vector<float> out(size_t(s.views) * s.count * 3);
  for (size_t i = 0; i < out.size() / 3; ++i) {
    const bool pile = s.dense && i % 100 != 0;  // nearly all points over one pixel
    const float spread = pile ? 0.3f / side : 1.0f;
    out[3 * i] = (2 * uniform(random) - 1) * 1.1f * s.width / side * spread;
    out[3 * i + 1] = (2 * uniform(random) - 1) * 1.1f * s.height / side * spread;
    float z = 1.0f + uniform(random);
    if (s.ties) z = std::round(z * 3.0f) / 3.0f;
    out[3 * i + 2] = i % 7 == 3 ? -z : z;
  }
  if (out.size() >= 30) {
    out[0] = NAN;
    out[5] = NAN;
    out[8] = INFINITY;
    out[10] = -INFINITY;
    out[14] = -0.0f;
  }
  return out;
}

void test_fragments(const Scene& s) {
  std::mt19937 random(1);
  const std::vector<float> ndc = cloud_ndc(s, random);
  const Fragments<float> want = brute_force(s, ndc);
  const Device<float> points(ndc);
  const Device<int> idx(want.idx.size());
  const Device<float> zbuf(want.idx.size()), dists2(want.idx.size());
  const RasterCloud cloud{points.data, nullptr, s.views, s.count, s.height, s.width, s.radius};
  const Device<char> workspace(raster_workspace_bytes(s.views, s.count, s.height, s.width));
  cuda(raster_fragments(cloud, {idx.data, zbuf.data, dists2.data, s.slots}, workspace.data, workspace.size, nullptr));
  cuda(cudaDeviceSynchronize());
  CHECK(idx.host() == want.idx, "%s: indices differ", s.name.c_str());
  CHECK(zbuf.host() == want.zbuf, "%s: depths differ", s.name.c_str());
  CHECK(dists2.host() == want.dists2, "%s: distances differ", s.name.c_str());

  if (s.count == 0) return;
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> gz(want.idx.size()), gd(want.idx.size()), g(ndc.size());
  for (float& x : gz) x = uniform(random);
  for (float& x : gd) x = uniform(random);
  std::vector<double> expected(ndc.size(), 0.0);
  for (size_t slot = 0; slot < want.idx.size(); ++slot) {
    const int i = want.idx[slot];
    if (i < 0) continue;
    const int in_view = int(slot / s.slots % (size_t(s.height) * s.width));
    const float x = center<float>(in_view % s.width, s.width, s.height), y = center<float>(in_view / s.width, s.height, s.width);
    expected[3 * size_t(i)] += 2.0 * gd[slot] * (double(ndc[3 * size_t(i)]) - x);
    expected[3 * size_t(i) + 1] += 2.0 * gd[slot] * (double(ndc[3 * size_t(i) + 1]) - y);
    expected[3 * size_t(i) + 2] += gz[slot];
  }
  const Device<float> dgz(gz), dgd(gd), grad(ndc.size(), 0);
  cuda(raster_fragments_backward(cloud, idx.data, s.slots, dgz.data, dgd.data, grad.data, nullptr));
  const double error = largest_error(grad.host(), expected);
  CHECK(error < 1e-5, "%s: fragment gradient off by %g", s.name.c_str(), error);
}

void test_render(const Scene& s) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<float> points(size_t(s.count) * 3), features(size_t(s.count) * s.channels);
  for (size_t i = 0; i < points.size(); ++i) points[i] = normal(random) * (i % 3 == 2 ? 0.5f : 0.8f);
  for (float& x : features) x = uniform(random);
  const std::vector<float> cams = cameras(s);
  const size_t pixels = size_t(s.views) * s.height * s.width;
  std::vector<float> depth_want;
  const std::vector<float> want = render(s, points, cams, features, &depth_want);

  const Device<float> dp(points), dc(cams), df(features), image(pixels * s.channels), depth(pixels);
  const Device<int> idx(pixels * s.slots);
  const Device<char> workspace(raster_workspace_bytes(s.views, s.count, s.height, s.width));
  const RasterCloud cloud{dp.data, dc.data, s.views, s.count, s.height, s.width, s.radius};
  RasterBlend blending{df.data, nullptr, s.count, s.channels, s.norm};
  RasterFragments out{};
  out.idx = idx.data;
  out.slots = s.slots;
  cuda(raster_render(cloud, blending, out, image.data, depth.data, workspace.data, workspace.size, nullptr));
  cuda(cudaDeviceSynchronize());
  double error = largest_error(image.host(), widen(want));
  CHECK(error < 1e-5, "%s: image off by %g", s.name.c_str(), error);
  CHECK(depth.host() == depth_want, "%s: depth differs", s.name.c_str());

  // Directional derivative of sum(g * image) + sum(h * depth) by central differences in double.
  std::vector<float> g(want.size()), h(depth_want.size());
  for (float& x : g) x = normal(random);
  for (float& x : h) x = normal(random);
  const Device<float> dg(g), dh(h), grad_points(points.size(), 0), grad_features(features.size(), 0);
  cuda(raster_render_backward(cloud, blending, dg.data, dh.data, idx.data, s.slots, grad_points.data, grad_features.data, nullptr));
  const std::vector<float> gp = grad_points.host(), gf = grad_features.host();
  const std::vector<double> wide_points = widen(points), wide_features = widen(features), wide_cams = widen(cams);
  auto loss = [&](const std::vector<double>& p, const std::vector<double>& f) {
    std::vector<double> d;
    const std::vector<double> im = render(s, p, wide_cams, f, &d);
    double sum = 0;
    for (size_t i = 0; i < im.size(); ++i) sum += g[i] * im[i];
    for (size_t i = 0; i < d.size(); ++i) sum += h[i] * d[i];
    return sum;
  };
  for (int which = 0; which < 2 && s.count > 0; ++which) {
    const double step = 1e-7;
    std::vector<double> p[2] = {wide_points, wide_points}, f[2] = {wide_features, wide_features};
    double analytic = 0, size = 0;
    const std::vector<float>& grad = which == 0 ? gp : gf;
    for (size_t i = 0; i < grad.size(); ++i) {
      const double direction = normal(random);
      (which == 0 ? p : f)[0][i] += step * direction;
      (which == 0 ? p : f)[1][i] -= step * direction;
      analytic += grad[i] * direction;
      size += std::fabs(grad[i] * direction);
    }
    const double numeric = (loss(p[0], f[0]) - loss(p[1], f[1])) / (2 * step);
    CHECK(std::fabs(numeric - analytic) <= 2e-5 * size, "%s: %s derivative %g, finite difference %g", s.name.c_str(),
          which == 0 ? "point" : "feature", analytic, numeric);
  }
}

void test_composite(const Scene& s) {
  std::mt19937 random(3);
  const Fragments<float> f = brute_force(s, cloud_ndc(s, random));
  std::uniform_real_distribution<float> uniform(0.0f, 1.0f);
  std::vector<float> features(size_t(s.count) * s.channels), background;
  for (float& x : features) x = uniform(random);
  for (int c = 0; c < s.channels && s.background; ++c) background.push_back(uniform(random));
  const std::vector<float> want = blend(s, f, features, background);
  const int64_t pixels = int64_t(f.idx.size()) / s.slots;
  const Device<int> idx(f.idx);
  const Device<float> dists2(f.dists2), df(features), db(background), image(want.size());
  const RasterBlend blending{df.data, s.background ? db.data : nullptr, s.count, s.channels, s.norm};
  cuda(raster_composite(idx.data, dists2.data, pixels, s.slots, blending, s.radius, image.data, nullptr));
  const double error = largest_error(image.host(), widen(want));
  CHECK(error < 1e-5, "%s: composite off by %g", s.name.c_str(), error);

  std::vector<float> g(want.size());
  std::normal_distribution<float> normal;
  for (float& x : g) x = normal(random);
  const Device<float> dg(g), gd(f.dists2.size()), gf(features.size(), 0);
  cuda(raster_composite_backward(dg.data, idx.data, dists2.data, pixels, s.slots, blending, s.radius, gd.data, gf.data, nullptr));
  const std::vector<float> grad = gd.host();
  double analytic = 0, size = 0;
  const double step = 1e-7 * s.radius * s.radius;
  Fragments<double> up{f.idx, {}, widen(f.dists2)}, down = up;
  for (size_t i = 0; i < grad.size(); ++i) {
    if (f.idx[i] < 0) {
      CHECK(grad[i] == 0.0f, "%s: gradient in an empty slot", s.name.c_str());
      continue;
    }
    const double direction = normal(random);
    up.dists2[i] += step * direction;
    down.dists2[i] -= step * direction;
    analytic += grad[i] * direction;
    size += std::fabs(grad[i] * direction);
  }
  const std::vector<double> wf = widen(features), wb = widen(background);
  const std::vector<double> a = blend(s, up, wf, wb), b = blend(s, down, wf, wb);
  double numeric = 0;
  for (size_t i = 0; i < a.size(); ++i) numeric += g[i] * (a[i] - b[i]) / (2 * step);
  CHECK(std::fabs(numeric - analytic) <= 2e-5 * size + 1e-5, "%s: weight derivative %g, finite difference %g", s.name.c_str(), analytic,
        numeric);
}

Scene scene(const char* name, int views, int count, int height, int width, int slots, int channels, float radius) {
  Scene s;
  s.name = name;
  s.views = views;
  s.count = count;
  s.height = height;
  s.width = width;
  s.slots = slots;
  s.channels = channels;
  s.radius = radius;
  return s;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: skipped\n");
    return 77;
  }
  std::vector<Scene> scenes = {
      scene("odd", 3, 301, 33, 17, 11, 3, 0.21f),        scene("wide", 2, 500, 20, 71, 10, 4, 0.15f),
      scene("one_slot", 1, 300, 32, 32, 1, 1, 0.12f),    scene("all_slots", 1, 400, 13, 12, 64, 3, 0.6f),
      scene("slots_33", 1, 400, 13, 12, 33, 7, 0.6f),    scene("empty", 2, 0, 6, 5, 4, 3, 0.1f),
      scene("one_pixel", 1, 30, 1, 1, 5, 2, 0.7f),       scene("huge_radius", 1, 60, 7, 19, 8, 3, 5.0f),
      scene("tiny_radius", 1, 5000, 40, 30, 10, 3, 0.02f), scene("many_scan_blocks", 1, 4000, 97, 131, 4, 3, 0.05f),
  };
  scenes.push_back(scene("ties", 2, 600, 21, 19, 6, 3, 0.2f));
  scenes.back().ties = true;
  scenes.push_back(scene("dense", 1, 50000, 9, 11, 10, 3, 0.15f));
  scenes.back().dense = true;
  for (const Scene& s : scenes) test_fragments(s);
  for (Scene s : scenes) {
    if (s.ties || s.dense) continue;
    test_render(s);
    s.background = true;
    test_composite(s);
    s.norm = true;
    s.name += "_norm";
    test_composite(s);
  }
  Scene s = scene("norm", 2, 200, 15, 18, 10, 5, 0.4f);
  s.norm = true;
  test_render(s);
  std::printf(failures == 0 ? "passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
