/* Pages that differ from a copy, or from their hashes: no system calls, but the same work. */
#define _GNU_SOURCE
#include "trackers.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static unsigned char *copy;

static const unsigned char *page(uint64_t number)
{
    return memory.bytes + number * PAGE_BYTES;
}

static void note(uint64_t number, int differs)
{
    uint64_t bit = UINT64_C(1) << number % 64;
    if (differs)
        memory.words[number / 64] |= bit;
    else
        memory.words[number / 64] &= ~bit;
}

static int is_noted(uint64_t number)
{
    return memory.words[number / 64] >> number % 64 & 1;
}

static void copy_all(void)
{
    copy = malloc(memory.size);
    check(copy != NULL, "malloc");
    memcpy(copy, memory.bytes, memory.size);
}

static void compare_all(void)
{
    for (uint64_t i = 0; i < memory.pages; i++)
        note(i, memcmp(page(i), copy + i * PAGE_BYTES, PAGE_BYTES) != 0);
}

static void copy_noted(uint64_t first, uint64_t pages)
{
    for (uint64_t i = first; i < first + pages; i++)
        if (is_noted(i))
            memcpy(copy + i * PAGE_BYTES, page(i), PAGE_BYTES);
}

static void drop_copy(void)
{
    free(copy);
}

const struct tracker comparison = {
    .arm = copy_all,
    .collect = compare_all,
    .collected = count_bits,
    .clear = copy_noted,
    .disarm = drop_copy,
};

#if __has_include(<xxhash.h>)
#define XXH_INLINE_ALL
#include <xxhash.h>

static XXH128_hash_t *kept;

static XXH128_hash_t hash(uint64_t number)
{
    return XXH3_128bits(page(number), PAGE_BYTES);
}

static void hash_all(void)
{
    kept = malloc(memory.pages * sizeof *kept);
    check(kept != NULL, "malloc");
    for (uint64_t i = 0; i < memory.pages; i++)
        kept[i] = hash(i);
}

static void compare_hashes(void)
{
    for (uint64_t i = 0; i < memory.pages; i++)
        note(i, !XXH128_isEqual(hash(i), kept[i]));
}

static void hash_noted(uint64_t first, uint64_t pages)
{
    for (uint64_t i = first; i < first + pages; i++)
        if (is_noted(i))
            kept[i] = hash(i);
}

static void drop_hashes(void)
{
    free(kept);
}

const struct tracker hashes = {
    .arm = hash_all,
    .collect = compare_hashes,
    .collected = count_bits,
    .clear = hash_noted,
    .disarm = drop_hashes,
};
#else
static void lacks_xxhash(const char *name, const char *option)
{
    (void)name, (void)option;
    errno = ENOENT;
    check(0, "xxhash.h");
}

const struct tracker hashes = {.prepare = lacks_xxhash};
#endif
