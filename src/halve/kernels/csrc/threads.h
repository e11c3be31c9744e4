/* Threads: those of the OpenMP runtime that torch uses, handed over by cpu.py.

   for_all is one parallel loop. A team is one parallel region that runs many loops, each ending in a barrier: starting
   threads anew for every product of a decode step would cost more than some of the products. */
#ifndef HALVE_THREADS_H
#define HALVE_THREADS_H

#include <stdatomic.h>
#include <stdint.h>

typedef struct {
    _Atomic int arrived;     /* threads that finished the current loop */
    _Atomic unsigned loops;  /* loops that all threads finished */
    _Atomic int64_t next;    /* first item of the current loop that nobody has taken */
} team_t;

/* One thread of a team. */
typedef struct {
    team_t *team;
    int threads;
    unsigned loops; /* that this thread has finished */
} member_t;

typedef void (*start_t)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*count_t)(void);

/* Hand over GOMP_parallel and omp_get_num_threads, or NULL: one thread. */
void halve_cpu_set_threads(start_t start_function, count_t count_function);

typedef void (*items_t)(void *data, int64_t first, int64_t last);

/* Run body over all items, in chunks that threads take as they come free; `bytes` is what it will read or write. */
void for_all(int64_t items, int64_t bytes, items_t body, void *data);

/* Run body(member, data) once in every thread; one thread where its `bytes` are few. */
void run_team(int64_t bytes, void (*body)(member_t *member, void *data), void *data);

/* Called by every member with the same arguments: body over all items, shared out; returns when all are done. */
void team_loop(member_t *member, int64_t items, items_t body, void *data);

#endif
