// Marks the arithmetic that the CPU side and the CUDA side share.
#pragma once

#if defined(__CUDACC__)
#define REPRISE_BOTH_SIDES __host__ __device__
#else
#define REPRISE_BOTH_SIDES
#endif
