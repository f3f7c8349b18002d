/* What the parts of the program share; trackers.c says what it is for. */
#ifndef TRACKERS_H
#define TRACKERS_H

#include <stdint.h>

#define PAGE_BYTES UINT64_C(4096)
#define LENGTH(array) (sizeof(array) / sizeof *(array))

/* The memory that is tracked, all of it populated. */
struct memory {
    unsigned char *bytes;
    uint64_t size, pages;
    uint64_t *words; /* a bit a page, for those that collect bits */
};

/* One mechanism. What it has collected and not cleared, it keeps. */
struct tracker {
    void (*prepare)(const char *name, const char *option); /* once; may be NULL */
    void (*arm)(void);
    void (*collect)(void);
    uint64_t (*collected)(void); /* how many pages that were; asked once */
    void (*clear)(uint64_t first, uint64_t pages);
    void (*disarm)(void);
    int64_t (*write)(const uint32_t *pages, uint64_t count); /* nanoseconds; NULL: plain stores */
};

extern struct memory memory;
extern int64_t collected_early; /* nanoseconds of collecting that could not wait for the command */

extern const struct tracker write_watch, initially_set_watch, soft_dirty, comparison, hashes, kvm_log, kvm_ring;

void check(int fine, const char *what);
int64_t now(void);
uint64_t count_bits(void);

#endif
