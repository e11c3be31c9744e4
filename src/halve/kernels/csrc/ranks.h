/* Sums over ranks: processes of one machine that share memory. Every rank makes the same calls in the same order. */
#ifndef HALVE_RANKS_H
#define HALVE_RANKS_H

#include <stdatomic.h>
#include <stdint.h>

/* Made and mapped by halve/ranks/shared.py. `memory`: a line of 64 bytes per rank, whose first number counts the sums it
   has come to, then two sets of `room` floats per rank, which sums take in turn: who writes into a set again has seen
   all ranks come to the next sum, and so leave this one. */
typedef struct {
    int64_t rank, size;
    int64_t first_token, vocabulary; /* where this rank's rows of the embedding begin, and those of all ranks end */
    int64_t room;
    int64_t sums;                    /* this rank has come to */
    void *memory;
    int (*lost)(double waited_s);    /* asked now and then while others are waited for: whether to give up */
} ranks_t;

/* numbers [rows][stride], of which `count` of each row count = their sum over ranks, the same bits on all of them; 0, or
   -1 where a rank is lost. */
int ranks_add(ranks_t *ranks, float *numbers, int64_t rows, int64_t stride, int64_t count);

#endif
