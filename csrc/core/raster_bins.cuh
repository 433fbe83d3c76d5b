// Points sorted into one cell per pixel by counting: exact at any density, each projected point is stored once.
#pragma once

#include "raster_common.cuh"

namespace fvgen {

struct Bins {
  int* start;       // [V, H * W + 1]; points of cell c of a view are records start[c] .. start[c + 1] - 1 of that view
  int* partial;     // [V, blocks] sums for the scan
  float4* records;  // [V, P] NDC x, NDC y, depth, point index as bits
};

// Cuts the workspace into its parts; returns its size in bytes. Pass null to ask for the size only.
size_t layout_bins(int views, int count, int height, int width, void* workspace, Bins* bins);

// Enqueues the sort.
cudaError_t fill_bins(const RasterCloud&, const Grid&, const Bins&, cudaStream_t);

}  // namespace fvgen
