// Compares with x / scale: quotient(x, exact_reciprocal(scale)), where that is accepted, and
// corrected_quotient(x, scale, nearest_reciprocal(scale)), which needs no proof.
//
// division SCALES SEED
//   every significand of x, its quotients near 1, for that many random scales, as many as
//   has_reciprocal() takes of all there are, and the notorious ones.
// division all SCALES SEED
//   every float x, for that many scales.
// division half
//   x * (1 / scale) rounded to half precision, every significand of both, at several exponents.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "numerics/division.h"

using namespace quantkit;

namespace {

// How many of the floats with bits begin, begin + 1, ... differ; below `tiny` they may.
template <class Quotient>
int64_t differing(Quotient quotient_of, float scale, float tiny, uint32_t begin, int64_t count) {
  int64_t total = 0;
  for (int64_t block = 0; block < count; block += 1 << 16) {
    int32_t wrong = 0;
    const int32_t length = int32_t(std::min<int64_t>(count - block, 1 << 16));
    for (int32_t i = 0; i < length; ++i) {
      const float x = bit_cast<float>(begin + uint32_t(block) + uint32_t(i));
      const float b = x / scale, a = quotient_of(x, b);
      const bool nan = (a != a) & (b != b);
      const bool small = (__builtin_fabsf(a) < tiny) & (__builtin_fabsf(b) < tiny);
      wrong += !((bit_cast<uint32_t>(a) == bit_cast<uint32_t>(b)) | nan | small);
    }
    total += wrong;
  }
  return total;
}

template <class Quotient>
int64_t differing(Quotient quotient_of, float scale, float tiny, bool all) {
  if (!all)
    return differing(quotient_of, scale, tiny, bit_cast<uint32_t>(scale) & 0x7f800000u, 1 << 23);
  int64_t total = 0;
  for (uint32_t part = 0; part < 512; ++part)
    total += differing(quotient_of, scale, tiny, part << 23, 1 << 23);
  return total;
}

// The borders; then scales that sweeps found, for which the quotient, unchecked, is wrong for one
// significand.
constexpr float kKept[] = {0x1.f63c0ep-7f,
                           0x1p-60f,
                           0x1p60f,
                           0x1.fffffep59f,
                           1.0f,
                           1.0f / 127,
                           0x1.e3e12cp+30f,
                           0x1.d52aeep-9f,
                           0x1.cfde8cp+54f,
                           0x1.a37f56p+49f,
                           0x1.a86c06p+46f,
                           0x1.a64e46p+46f,
                           0x1.ce1b5cp-36f,
                           0x1.ee742ep+42f,
                           0x1.6d37fep+53f,
                           0x1.c9c18ep-8f,
                           0x1.ec467cp-3f,
                           0x1.68c50ep-23f,
                           0x1.bcc2acp+33f,
                           0x1.9be876p-27f,
                           0x1.dbc1ccp-6f,
                           0x1.d1e07ep+11f,
                           0x1.a9847ep+9f,
                           0x1.3e7546p+58f,
                           0x1.a05aaep-7f,
                           0x1.ff4e0ep-10f,
                           0x1.b62386p-23f,
                           0x1.f0b03ep-48f,
                           0x1.c7383ep-2f,
                           0x1.77d496p-20f,
                           0x1.e9c52cp-51f,
                           0x1.b50436p+58f,
                           0x1.e7444ep-28f,
                           0x1.722a06p-31f,
                           0x1.7a8bbep-12f,
                           0x1.75311ep+10f,
                           0x1.af7eeep-18f,
                           0x1.ffe8f2p0f,
                           0x1.fffd8ap7f};  // by the second nearest midpoint only

template <class T>
int64_t half_differing(int bits, int64_t& pairs) {
  int64_t wrong = 0;
  for (uint32_t m = 0; m < 1u << bits; ++m)
    for (uint32_t n = 0; n < 1u << bits; ++n)
      for (int exponent : {-14, -1, 0, 9}) {
        const float x = bit_cast<float>((127u << 23) | m << (23 - bits));
        const float scale = bit_cast<float>((uint32_t(127 + exponent) << 23) | n << (23 - bits));
        const float reciprocal = reciprocal_for_code<T>(scale, 0);
        const float b = rounded<T>(x / scale), a = rounded<T>(x * reciprocal);
        wrong += bit_cast<uint32_t>(a) != bit_cast<uint32_t>(b);
        ++pairs;
      }
  return wrong;
}

int sweep_half() {
  int64_t pairs = 0;
  const int64_t wrong = half_differing<f16>(10, pairs) + half_differing<bf16>(7, pairs);
  std::printf("pairs %lld wrong %lld\n", (long long)pairs, (long long)wrong);
  return wrong != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (std::string(argv[1]) == "half") return sweep_half();
  const bool all = std::string(argv[1]) == "all";
  const int64_t scales = std::atoll(argv[argc - 2]);
  std::mt19937 random(uint32_t(std::atoll(argv[argc - 1])));
  std::vector<float> tried(std::begin(kKept), std::end(kKept));
  if (all) tried.resize(2);
  const size_t kept = tried.size();
  while (int64_t(tried.size()) < scales + (all ? 0 : int64_t(kept))) {
    const float scale = bit_cast<float>(uint32_t(random()));
    if (has_reciprocal(scale)) tried.push_back(scale);
  }

  std::atomic<int64_t> next{0}, accepted{0}, wrong{0}, refused_wrong{0}, corrected_wrong{0};
  const auto work = [&] {
    for (int64_t i = next++; i < int64_t(tried.size()); i = next++) {
      const float scale = tried[i];
      Reciprocal r;
      const bool exact = exact_reciprocal(scale, r);
      const Reciprocal nearest = nearest_reciprocal(scale);
      const int64_t found =
          differing([r](float x, float) { return quotient(x, r); }, scale, 0x1p-70f, all && exact);
      accepted += exact;
      (exact ? wrong : refused_wrong) += found;
      if (found)
        std::printf("%s %a: %lld differ\n", exact ? "accepted" : "refused", scale,
                    (long long)found);
      // Only for finite quotients.
      corrected_wrong += differing(
          [nearest, scale](float x, float b) {
            return b - b == 0 ? corrected_quotient(x, scale, nearest) : b;
          },
          scale, 0x1p-40f, all);
    }
  };
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t)
    threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  std::printf(
      "kept %zu scales %zu accepted %lld wrong %lld refused_wrong %lld corrected_wrong %lld\n",
      kept, tried.size(), (long long)accepted, (long long)wrong, (long long)refused_wrong,
      (long long)corrected_wrong);
  return wrong != 0 || corrected_wrong != 0;
}
