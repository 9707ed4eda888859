#ifndef SIEVE_H
#define SIEVE_H

#include <stddef.h>

/* Marks the numbers below `limit` that are not prime. Gives NULL when there is no memory;
   the caller frees what it gets. */
unsigned char *sieve(size_t limit);

#endif
