/* The statistics of lrkit.metrics.UncertaintyMetric in one pass over memory: see native.py, and the readable form in
   metrics/sensitivity.py. Every tensor is contiguous float32. The flat tensors hold all entries, tensor after tensor. */

#include <math.h>
#include <stdint.h>

/* Whether all gradients are finite: 0 times infinity, and any sum with a NaN in it, is NaN. */
int lrkit_finite(int64_t tensors, const float *const *grad, const int64_t *size)
{
    for (int64_t t = 0; t < tensors; t++) {
        const float *g = grad[t];
        float zeros = 0;
#pragma omp simd reduction(+ : zeros)
        for (int64_t j = 0; j < size[t]; j++)
            zeros += g[j] * 0.0f;
        if (zeros != 0.0f)
            return 0;
    }
    return 1;
}

/* mean = b1 mean + (1 - b1) I, then deviation = b2 deviation + (1 - b2) |I - mean|, with I as given. */
#define SMOOTH(IMPORTANCE)                                                                                             \
    for (int64_t t = 0; t < tensors; t++) {                                                                            \
        const float *restrict w = weight[t], *restrict g = grad[t];                                                    \
        float *restrict m = mean, *restrict u = deviation;                                                             \
        for (int64_t j = 0; j < size[t]; j++) {                                                                        \
            const float importance = IMPORTANCE;                                                                       \
            const float moved = m[j] + (importance - m[j]) * rate1;                                                    \
            m[j] = moved;                                                                                              \
            u[j] = u[j] + (fabsf(importance - moved) - u[j]) * rate2;                                                  \
        }                                                                                                              \
        mean += size[t];                                                                                               \
        deviation += size[t];                                                                                          \
    }

/* kind 0: |w g|; 1: |g|; 2: |g| / (|w| + epsilon). rate1 = 1 - b1, rate2 = 1 - b2. */
void lrkit_smooth(int kind, int64_t tensors, const float *const *weight, const float *const *grad,
                  const int64_t *size, float *mean, float *deviation, float rate1, float rate2, float epsilon)
{
    if (kind == 0)
        SMOOTH(fabsf(w[j] * g[j]))
    else if (kind == 1)
        SMOOTH(fabsf(g[j]))
    else
        SMOOTH(fabsf(g[j]) / (fabsf(w[j]) + epsilon))
}

/* Adds to scores [blocks, units] the mean of mean * deviation over each unit's entries of one part, which lie as
   [blocks, outer, units, inner]. Float sums are kept short, and added up in double. */
#define LANES 1024

void lrkit_score(int64_t blocks, int64_t outer, int64_t units, int64_t inner, const float *mean,
                 const float *deviation, double *scores)
{
    const double share = 1.0 / (double)(outer * inner);
    for (int64_t b = 0; b < blocks; b++, scores += units) {
        if (inner == 1 && units <= LANES) {
            /* A unit's entries are `units` apart: add up whole rows, as many side by side as there are lanes. */
            const int64_t rows = outer < LANES / units ? outer : LANES / units, width = rows * units;
            float lanes[LANES] = {0};
            for (int64_t left = outer * units; left > 0; left -= width) {
                const int64_t here = left < width ? left : width;
                for (int64_t j = 0; j < here; j++)
                    lanes[j] += mean[j] * deviation[j];
                mean += here, deviation += here;
            }
            for (int64_t row = 0; row < rows; row++)
                for (int64_t i = 0; i < units; i++)
                    scores[i] += share * (double)lanes[row * units + i];
            continue;
        }
        for (int64_t o = 0; o < outer; o++)
            for (int64_t i = 0; i < units; i++)
                for (int64_t left = inner; left > 0; left -= LANES) {
                    const int64_t here = left < LANES ? left : LANES;
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (int64_t j = 0; j < here; j++)
                        sum += mean[j] * deviation[j];
                    scores[i] += share * (double)sum;
                    mean += here, deviation += here;
                }
    }
}
