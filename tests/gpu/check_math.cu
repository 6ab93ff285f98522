// The noise arithmetic on the device against IEEE and against the host, on all the inputs there are.
//
// 1. Radii: for each of the 2^31 odd words v, the square root of csrc/noise/lanes.h (rsqrt.approx and two
//    corrections) against __fsqrt_rn, bit for bit.
// 2. Every fp32 number between the smallest and the largest of those radii.
// 3. Philox and the eight normals of a few million words, device against host, bit for bit.
//
// nvcc -std=c++20 -O3 -I <repository> -arch=sm_90 -Xcompiler -ffp-contract=off tests/gpu/check_math.cu -o
// check_math Prints one line of JSON. Exit: 0 all equal, 1 a difference, 2 no usable GPU.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "csrc/noise/normal.h"

namespace {

struct Found {
  unsigned long long tried, wrong;
  uint32_t smallest, largest;  // bits: of positive numbers they sort as the numbers do
  uint32_t example;            // a word or radius that differs
};

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "check_math: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ? 2 : 1);
}

__device__ void compare(float s, uint32_t input, Found& mine) {
  const uint32_t got = zk::bits(zk::sqrt(s)), want = zk::bits(__fsqrt_rn(s)), radius = zk::bits(s);
  ++mine.tried;
  if (got != want) {
    ++mine.wrong;
    mine.example = input;
  }
  mine.smallest = min(mine.smallest, radius);
  mine.largest = max(mine.largest, radius);
}

__device__ void merge(const Found& mine, Found* total) {
  atomicAdd(&total->tried, mine.tried);
  atomicMin(&total->smallest, mine.smallest);
  atomicMax(&total->largest, mine.largest);
  if (mine.wrong != 0) {
    atomicAdd(&total->wrong, mine.wrong);
    total->example = mine.example;
  }
}

__global__ void all_words(uint32_t mantissa, Found* total) {
  Found mine{0, 0, 0xffffffffu, 0, 0};
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < uint64_t{1} << 31;
       i += stride) {
    const uint32_t v = static_cast<uint32_t>(2 * i + 1);
    compare(zk::radius_squared<float>(v, mantissa), v, mine);
  }
  merge(mine, total);
}

__global__ void all_floats(uint32_t first, uint32_t last, Found* total) {
  Found mine{0, 0, 0xffffffffu, 0, 0};
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  uint64_t b = first + static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; b <= last; b += stride)
    compare(zk::from_bits(static_cast<uint32_t>(b)), static_cast<uint32_t>(b), mine);
  merge(mine, total);
}

ZK_HD void normals_of(uint64_t block, const zk::PhiloxKey& key, uint32_t mantissa, float z[8]) {
  const auto x = zk::philox<zk::Scalar>(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 7u,
                                        zk::kNormal, key);
  zk::normal8(x, z, mantissa);
}

__global__ void normals(uint64_t seed, uint64_t first, uint32_t blocks, uint32_t mantissa, float* out) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= blocks) return;
  float z[8];
  normals_of(first + i, zk::philox_key(seed), mantissa, z);
  for (int e = 0; e < 8; ++e) out[8 * static_cast<size_t>(i) + e] = z[e];
}

Found run(const char* what, const auto& launch) {
  Found found{0, 0, 0xffffffffu, 0, 0}, *total = nullptr;
  check(cudaMalloc(&total, sizeof(Found)), "cudaMalloc");
  check(cudaMemcpy(total, &found, sizeof(Found), cudaMemcpyHostToDevice), "cudaMemcpy");
  launch(total);
  check(cudaGetLastError(), what);
  check(cudaMemcpy(&found, total, sizeof(Found), cudaMemcpyDeviceToHost), what);
  check(cudaFree(total), "cudaFree");
  return found;
}

void print(const char* name, const Found& f) {
  std::printf(
      "\"%s\": {\"tried\": %llu, \"wrong\": %llu, \"smallest\": %.9g, \"largest\": %.9g, \"example\": %u}, ",
      name, f.tried, f.wrong, static_cast<double>(zk::from_bits(f.smallest)),
      static_cast<double>(zk::from_bits(f.largest)), f.example);
}

}  // namespace

int main() {
  int devices = 0;
  check(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "cudaGetDeviceProperties");
  const unsigned grid = device.multiProcessorCount * 8;

  const Found words = run("all_words", [&](Found* t) { all_words<<<grid, 256>>>(zk::kMantissa, t); });
  const Found floats = run("all_floats",
                           [&](Found* t) { all_floats<<<grid, 256>>>(words.smallest, words.largest, t); });

  constexpr uint32_t kBlocks = 1u << 20;  // of four words
  // the low counter word wraps
  const uint64_t seed = 0x243f6a8885a308d3u, first = (uint64_t{1} << 32) - kBlocks / 2;
  float* device_z = nullptr;
  check(cudaMalloc(&device_z, size_t{kBlocks} * 8 * sizeof(float)), "cudaMalloc");
  normals<<<(kBlocks + 255) / 256, 256>>>(seed, first, kBlocks, zk::kMantissa, device_z);
  check(cudaGetLastError(), "normals");
  std::vector<float> z(size_t{kBlocks} * 8);
  check(cudaMemcpy(z.data(), device_z, z.size() * sizeof(float), cudaMemcpyDeviceToHost), "normals");
  check(cudaFree(device_z), "cudaFree");
  uint64_t wrong = 0;
  const zk::PhiloxKey key = zk::philox_key(seed);
  for (uint32_t i = 0; i < kBlocks; ++i) {
    float want[8];
    normals_of(first + i, key, zk::kMantissa, want);
    for (int e = 0; e < 8; ++e) wrong += zk::bits(want[e]) != zk::bits(z[8 * size_t{i} + e]);
  }

  std::printf("{\"gpu\": \"%s\", ", device.name);
  print("radii", words);
  print("every_float_between", floats);
  std::printf("\"normals\": {\"tried\": %zu, \"wrong\": %llu}}\n", z.size(),
              static_cast<unsigned long long>(wrong));
  const bool complete = words.tried == uint64_t{1} << 31 &&
                        floats.tried == uint64_t{words.largest} - words.smallest + 1;
  return complete && words.wrong + floats.wrong + wrong == 0 ? 0 : 1;
}
