#include "sieve.h"

#include <stdlib.h>

unsigned char *sieve(size_t limit)
{
    unsigned char *composite = calloc(limit < 2 ? 2 : limit, 1);
    if (!composite)
        return NULL;
    composite[0] = composite[1] = 1;
    for (size_t n = 2; n * n < limit; n++) {
        if (composite[n])
            continue;
        for (size_t multiple = n * n; multiple < limit; multiple += n)
            composite[multiple] = 1;
    }
    return composite;
}
