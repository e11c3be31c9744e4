#include "ranks.h"

#include <sched.h>
#include <string.h>
#include <time.h>

enum { LINE = 64 };
/* looks at another rank's count before the processor is offered to others, and before somebody is asked about it */
enum { PEEKS = 20000, ASKED_AFTER = 4096 };

static _Atomic int64_t *arrived(const ranks_t *ranks, int64_t rank) {
    return (_Atomic int64_t *)((char *)ranks->memory + rank * LINE);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int wait_for(const ranks_t *ranks, int64_t rank) {
    const double start = seconds();
    double asked = 0;
    for (int64_t look = 0; atomic_load_explicit(arrived(ranks, rank), memory_order_acquire) < ranks->sums; ++look) {
        if (look < PEEKS) continue;
        sched_yield();
        if (look % ASKED_AFTER) continue;
        const double waited = seconds() - start;
        if (waited - asked < 0.2) continue;
        asked = waited;
        if (ranks->lost(waited)) return -1;
    }
    return 0;
}

int ranks_add(ranks_t *ranks, float *numbers, int64_t rows, int64_t stride, int64_t count) {
    float *set = (float *)((char *)ranks->memory + ranks->size * LINE) + ranks->sums % 2 * ranks->size * ranks->room;
    for (int64_t m = 0; m < rows; ++m)
        memcpy(set + ranks->rank * ranks->room + m * count, numbers + m * stride, (size_t)count * sizeof(float));
    ++ranks->sums;
    atomic_store_explicit(arrived(ranks, ranks->rank), ranks->sums, memory_order_release);
    for (int64_t rank = 0; rank < ranks->size; ++rank)
        if (wait_for(ranks, rank)) return -1;
    for (int64_t m = 0; m < rows; ++m) {
        float *sum = numbers + m * stride;
        memcpy(sum, set + m * count, (size_t)count * sizeof(float));
        for (int64_t rank = 1; rank < ranks->size; ++rank) {
            const float *part = set + rank * ranks->room + m * count;
            for (int64_t c = 0; c < count; ++c) sum[c] += part[c];
        }
    }
    return 0;
}
