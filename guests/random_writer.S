# The random writer: a boot sector that writes one byte in a random 4 KiB page of a range, for ever.
#
# What it promises, from the moment when the started marker is set:
#   - Write n adds 1 to byte 0 of page (x(n) * pages) >> 32 of [first, last), one instruction a write, where x(0) is the
#     seed and x(n) = (1664525 * x(n - 1) + 1013904223) mod 2^32. Each x comes once in 2^32 writes. So which pages were
#     written, and how often, follows from the number of writes.
#   - The counter holds the writes made. Only between a write and its count has one more been made than it says; and, as
#     the counter is added to in two halves, only right after each 2^32nd write may it be read 2^32 too low.
#   - COM1 gets 'A' once.
#   - The sector's own page is never written.
#
#   - With an interval, writes are that many nanoseconds apart on average, as long as the processor gets its time. What it
#     is late by, it makes up for; but no more than 2^30 ticks of the time stamp counter, a fraction of a second. Where
#     nobody tells how fast that counter runs, COM1 gets '?', and the guest halts without ever setting its marker.
#
# sector.inc says how it starts and what is where; src/dirtylog/guests/random_writer.py holds the same numbers. Two more
# parameters follow the others:
#
#   0x7c10  u32      seed
#   0x7c14  u32      interval in nanoseconds, at most 100 million; 0 for as fast as it goes

        .include "sector.inc"

# From Numerical Recipes: a full period, and high bits that are fit for this. The page number is made of those alone.
        .set    MULTIPLIER,     1664525
        .set    INCREMENT,      1013904223

# KVM's clock (Linux, Documentation/virt/kvm/x86/msr.rst): the hypervisor fills 32 bytes at the address in the MSR.
        .set    MSR_CLOCK,      0x4b564d01
        .set    CLOCK,          STATUS + 0x20
        .set    CLOCK_FACTOR,   CLOCK + 24      # u32: nanoseconds = (ticks shifted left * factor) >> 32
        .set    CLOCK_SHIFT,    CLOCK + 28      # i8
        .set    MOST_ASKS,      1 << 16
        .set    MOST_LATE,      1 << 30

        .macro  write_page
        imull   $MULTIPLIER, %esi, %esi
        addl    $INCREMENT, %esi
        movl    %esi, %eax
        mull    %ebp                            # EDX = (x * pages) >> 32
        shll    $12, %edx
# One instruction reads, adds and writes: a stopped processor is before it or after it.
        incb    (%ebx, %edx)
        addl    $1, COUNTER
        adcl    $0, COUNTER + 4
        .endm

        begin_sector "DLR2"
seed:   .long   1
interval: .long 0
        enter_protected_mode
        start_afresh

        cmpl    %eax, interval
        je      at_work                         # ticks are of no interest

# Ask for the clock, for long enough that it was filled, then have it left alone.
        movl    %eax, CLOCK_FACTOR
        movl    $MSR_CLOCK, %ecx
        xorl    %edx, %edx
        movl    $(CLOCK + 1), %eax              # bit 0 enables
        wrmsr
        movl    $MOST_ASKS, %edi
ask:
        cmpl    $0, CLOCK_FACTOR
        jne     told
        decl    %edi
        jnz     ask
        movw    $COM1_DATA, %dx
        movb    $'?', %al
        outb    %al, %dx
halt:
        hlt
        jmp     halt
told:
        xorl    %eax, %eax
        wrmsr

# ticks = (interval << 32) / factor >> shift. The factor is 2^31 or more, so the quotient fits.
        movl    interval, %edx
        divl    CLOCK_FACTOR
        movb    CLOCK_SHIFT, %cl
        testb   %cl, %cl
        js      slower
        shrl    %cl, %eax
        jmp     at_work
slower:
        negb    %cl
        shll    %cl, %eax

at_work:
        movl    %eax, %ecx                      # ticks
        movl    seed, %esi
        movl    %ebx, %ebp
        movl    first, %ebx
        subl    %ebx, %ebp
        shrl    $12, %ebp                       # pages

        announce

        testl   %ecx, %ecx
        jz      write

# EDI is the low half of the time stamp at which the next write is due, never more than the interval ahead.
afresh:
        rdtsc
        movl    %eax, %edi
wait:
        rdtsc
        subl    %edi, %eax                      # how late
        cmpl    $MOST_LATE, %eax
        jb      due
        negl    %eax                            # how early
        cmpl    %ecx, %eax
        jbe     wait
        jmp     afresh                          # it stood still for long, or on another processor
due:
        addl    %ecx, %edi
        write_page
        jmp     wait

write:
        write_page
        jmp     write

        end_sector
