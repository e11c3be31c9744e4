#include "threads.h"

#include <sched.h>
#include <stddef.h>

static start_t start;
static count_t thread_count;

/* less work than this is done before a second thread has woken up */
enum { SERIAL_BYTES = 1 << 16 };
/* looks at a barrier before the processor is offered to others: about the time of a small product */
enum { SPINS = 20000 };
/* a thread takes this part of what is left, divided by the number of threads: long runs of memory at first, single
   items at last, so that all are done at the same time whatever other programs took from some */
enum { PART = 3 };

void halve_cpu_set_threads(start_t start_function, count_t count_function) {
    start = start_function;
    thread_count = count_function;
}

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

void team_loop(member_t *member, int64_t items, items_t body, void *data) {
    team_t *team = member->team;
    int64_t first = atomic_load_explicit(&team->next, memory_order_relaxed);
    while (first < items) {
        const int64_t last = first + (items - first) / (PART * member->threads) + 1;
        if (!atomic_compare_exchange_weak_explicit(&team->next, &first, last, memory_order_relaxed,
                                                   memory_order_relaxed))
            continue; /* another thread was faster: `first` is what it left */
        body(data, first, last);
        first = atomic_load_explicit(&team->next, memory_order_relaxed);
    }
    ++member->loops;
    if (atomic_fetch_add_explicit(&team->arrived, 1, memory_order_acq_rel) == member->threads - 1) {
        /* the last one: nobody else touches the team until it is told to go on */
        atomic_store_explicit(&team->next, 0, memory_order_relaxed);
        atomic_store_explicit(&team->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&team->loops, member->loops, memory_order_release);
        return;
    }
    for (int spin = 0; atomic_load_explicit(&team->loops, memory_order_acquire) != member->loops; ++spin) {
        if (spin < SPINS) relax();
        else sched_yield();
    }
}

typedef struct {
    team_t team;
    void (*body)(member_t *, void *);
    void *data;
} region_t;

static void join(void *argument) {
    region_t *region = argument;
    member_t member = {&region->team, thread_count(), 0};
    region->body(&member, region->data);
}

void run_team(int64_t bytes, void (*body)(member_t *, void *), void *data) {
    region_t region = {.body = body, .data = data};
    if (start && bytes >= SERIAL_BYTES) {
        start(join, &region, 0, 0); /* 0 threads: as many as torch was set to */
        return;
    }
    member_t member = {&region.team, 1, 0};
    body(&member, data);
}

typedef struct {
    int64_t items;
    items_t body;
    void *data;
} loop_t;

static void one_loop(member_t *member, void *data) {
    const loop_t *loop = data;
    team_loop(member, loop->items, loop->body, loop->data);
}

void for_all(int64_t items, int64_t bytes, items_t body, void *data) {
    loop_t loop = {items, body, data};
    run_team(bytes, one_loop, &loop);
}
