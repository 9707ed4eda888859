#include "sieve.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
    size_t limit = argc > 1 ? strtoul(argv[1], NULL, 10) : 100;
    unsigned char *composite = sieve(limit);
    if (!composite) {
        perror("sieve");
        return 1;
    }
    const char *separator = "";
    for (size_t n = 2; n < limit; n++) {
        if (!composite[n]) {
            printf("%s%zu", separator, n);
            separator = " ";
        }
    }
    putchar('\n');
    free(composite);
    return 0;
}
