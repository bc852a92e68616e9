/* The statistics of lrkit.metrics.UncertaintyMetric in one pass over memory: see native.py, and the readable form in
   metrics/sensitivity.py. Every tensor is contiguous float32. The flat tensors hold all entries, tensor after tensor. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* One tensor: where it is, and how its entries make up units. They lie as [outer, units, inner]. */
struct tensor {
    const float *weight, *grad;
};

struct shape {
    int64_t start;               /* of its entries in the flat tensors */
    int64_t outer, units, inner;
    int64_t first;               /* where its units' scores stand: each tensor has places of its own */
};

struct job {
    int kind, scoring;           /* kind 0: |w g|; 1: |g|; 2: |g| / (|w| + epsilon) */
    float rate1, rate2, epsilon; /* 1 - b1, 1 - b2 */
    const struct tensor *tensors;
    const struct shape *shapes;
    float *mean, *deviation;
    double *scores;
};

static int64_t size_of(const struct shape *s) { return s->outer * s->units * s->inner; }

/* 0 times infinity, and any sum with a NaN in it, is NaN. */
static int all_finite(const float *grad, int64_t size)
{
    float zeros = 0;
#pragma omp simd reduction(+ : zeros)
    for (int64_t j = 0; j < size; j++)
        zeros += grad[j] * 0.0f;
    return zeros == 0.0f;
}

/* From old towards new by a rate, exact at both ends: torch.lerp's formula. */
static inline float lerp(float old, float new, float rate)
{
    return rate < 0.5f ? old + (new - old) * rate : new - (new - old) * (1 - rate);
}

/* mean = b1 mean + (1 - b1) I, then deviation = b2 deviation + (1 - b2) |I - mean|. */
#define SMOOTH(IMPORTANCE)                                                                                             \
    for (int64_t j = 0; j < size; j++) {                                                                               \
        const float importance = IMPORTANCE;                                                                           \
        mean[j] = lerp(mean[j], importance, rate1);                                                                    \
        deviation[j] = lerp(deviation[j], fabsf(importance - mean[j]), rate2);                                         \
    }

static void smooth(const struct job *job, const struct tensor *tensor, int64_t size, float *restrict mean,
                   float *restrict deviation)
{
    const float *restrict w = tensor->weight, *restrict g = tensor->grad;
    const float rate1 = job->rate1, rate2 = job->rate2, epsilon = job->epsilon;
    if (job->kind == 0)
        SMOOTH(fabsf(w[j] * g[j]))
    else if (job->kind == 1)
        SMOOTH(fabsf(g[j]))
    else
        SMOOTH(fabsf(g[j]) / (fabsf(w[j]) + epsilon))
}

/* Adds to each unit's score the mean of mean * deviation over its entries. Float sums are kept short. */
#define LANES 1024

static void score(const struct shape *s, const float *restrict mean, const float *restrict deviation, double *scores)
{
    const double share = 1.0 / (double)(s->outer * s->inner);
    if (s->inner == 1 && s->units <= LANES) {
        /* A unit's entries are `units` apart: add up whole rows, as many side by side as there are lanes. */
        const int64_t rows = LANES / s->units, width = rows * s->units;
        float lanes[LANES] = {0};
        for (int64_t left = s->outer * s->units; left > 0; left -= width) {
            const int64_t here = left < width ? left : width;
            for (int64_t j = 0; j < here; j++)
                lanes[j] += mean[j] * deviation[j];
            mean += here, deviation += here;
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t i = 0; i < s->units; i++)
                scores[i] += share * (double)lanes[row * s->units + i];
        return;
    }
    for (int64_t o = 0; o < s->outer; o++)
        for (int64_t i = 0; i < s->units; i++)
            for (int64_t left = s->inner; left > 0; left -= LANES) {
                const int64_t here = left < LANES ? left : LANES;
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < here; j++)
                    sum += mean[j] * deviation[j];
                scores[i] += share * (double)sum;
                mean += here, deviation += here;
            }
}

/* A tensor's statistics are scored while they are in the cache. */
static void observe(const struct job *job, int64_t t)
{
    const struct shape *s = &job->shapes[t];
    float *mean = job->mean + s->start, *deviation = job->deviation + s->start;
    if (job->tensors != NULL)
        smooth(job, &job->tensors[t], size_of(s), mean, deviation);
    if (job->scoring)
        score(s, mean, deviation, job->scores + s->first);
}

/* Moves the statistics of `count` tensors by one step (unless `tensors` is null), then adds up the scores (if `scoring`).
   Which thread takes which tensor changes no number. Returns 0, with nothing changed, where a gradient is not finite;
   else 1. */
int lrkit_observe(const struct job *job, int64_t count, int threads)
{
    const int64_t chunk = 1 + count / (64 * threads); /* tensors differ in size, and taking one costs something, too */
    int finite = 1;
#pragma omp parallel num_threads(threads)
    {
        if (job->tensors != NULL) {
#pragma omp for schedule(dynamic, chunk) reduction(& : finite)
            for (int64_t t = 0; t < count; t++)
                finite &= all_finite(job->tensors[t].grad, size_of(&job->shapes[t]));
        }
        if (finite) {
#pragma omp for schedule(dynamic, chunk)
            for (int64_t t = 0; t < count; t++)
                observe(job, t);
        }
    }
    return finite;
}
