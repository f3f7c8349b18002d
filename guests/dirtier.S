# The dirtier: a boot sector that writes one byte in every 4 KiB page of a range, for ever.
#
# It starts as a PC BIOS starts a boot sector: 16-bit real mode, at linear address 0x7c00. It calls no BIOS, needs no
# stack and takes no interrupt, so a bare virtual machine runs it as well as one with a BIOS. It uses no instruction
# newer than the 386.
#
# What it promises, from the moment when the started marker is set:
#   - Round n adds 1 to byte 0 of every page of [first, last), in ascending order, one instruction a page. So at any
#     moment when the processor is stopped, walking up, those bytes are equal, except that at one place at most the value
#     drops by exactly 1 (mod 256).
#   - The round counter holds the rounds completed. Pages below that place hold counter + 1, the others counter (mod
#     256). The two agree to the instruction: only between a round's last page and its count do all pages hold
#     counter + 1.
#   - COM1 gets 'A' once, then 'B' after each round is counted.
#   - The sector's own page is never written.
#
# Layout. Addresses are linear; all fields are little-endian. src/dirtylog/guests/dirtier.py holds the same numbers.
#
#   0x7c04  4 bytes  magic "DLP1": a loader checks it before it patches. Another layout gets another digit.
#   0x7c08  u32      first: address of the first page to write
#   0x7c0c  u32      last: the address after the last page; first < last, both multiples of 4096
#
#   0x8000  u64      rounds completed
#   0x8008  4 bytes  started marker "RUN1"
#
# The parameters sit after the entry jump, where file systems keep theirs, rather than at the sector's end: that is the
# place of the partition table, which BIOSes and QEMU read to guess the disk's geometry. It is left empty.
#
# The status block has the first page above the sector's. It is conventional memory that every PC BIOS leaves to the
# boot loader (0x7e00 to 0x7ffff), below any range that a loader may ask for, and, in a page of its own, it shows on
# the host as the one low page that is written.

        .set    STATUS,         0x8000
        .set    ROUNDS,         STATUS
        .set    STARTED,        STATUS + 8
        .set    STARTED_MAGIC,  0x314e5552      # "RUN1"

        .set    PAGE,           4096
        .set    DEFAULT_FIRST,  1 << 20
        .set    DEFAULT_LAST,   100 << 20

        .set    CODE,           8               # GDT selectors
        .set    DATA,           16

        .set    COM1_DATA,      0x3f8
        .set    COM1_LCR,       0x3fb
        .set    PORT_A20,       0x92

# Pages per turn of the inner loop, a power of two. Where a hypervisor emulates each instruction, instructions per page
# are the speed: 32 pages in 34 instructions. Twice as many would not fit.
        .set    UNROLL,         32
        .set    STEP_SIZE,      7               # bytes of one unrolled instruction, held to below

        .text
        .code16
        .globl  _start
_start:
        jmp     start

        .org    4
        .ascii  "DLP1"
first:  .long   DEFAULT_FIRST
last:   .long   DEFAULT_LAST

# Flat 4 GiB segments. Their accessed bits are set beforehand: else the processor would set them here, in memory. The
# null descriptor is never read, and holds the pointer for LGDT.
gdt:
        .word   gdt_end - gdt - 1
        .long   gdt
        .word   0
        .quad   0x00cf9b000000ffff              # CODE: 32-bit, execute and read, ring 0
        .quad   0x00cf93000000ffff              # DATA: read and write, ring 0
gdt_end:

start:
        cli
        xorw    %ax, %ax                        # A BIOS may leave anything in DS.
        movw    %ax, %ds

# A20. Bit 0 of port 0x92 resets the machine when written as 1; a machine without the port reads as 0xff.
        inb     $PORT_A20, %al
        orb     $0x02, %al
        andb    $0xfe, %al
        outb    %al, $PORT_A20

        lgdt    gdt
        movl    %cr0, %eax
        orb     $0x01, %al                      # PE
        movl    %eax, %cr0
        ljmp    $CODE, $protected

        .code32
protected:
# All five, though only DS is used: KVM on processors without unrestricted guest mode emulates every instruction for as
# long as one segment register holds a value from real mode.
        movw    $DATA, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    %ax, %fs
        movw    %ax, %gs

# A reset leaves memory as it was. The marker goes first, so that it never stands beside counters of an earlier life.
        xorl    %eax, %eax
        movl    %eax, STARTED
        movl    %eax, ROUNDS
        movl    %eax, ROUNDS + 4

# Level the pages: a BIOS or an earlier life may have left bytes in them.
        movl    first, %ecx
        movl    last, %ebx
level:
        movb    %al, (%ecx)
        addl    $PAGE, %ecx
        cmpl    %ebx, %ecx
        jb      level

# A page's address is kept as EBX + EAX, with EBX = last and EAX counting up to 0, so that ADD's own flags end the loop.
# A turn covers UNROLL pages. The first turn of a round is the short one when the range is not a multiple of that: it
# begins inside the loop, at the instruction for `first`.
#   ESI = EAX at the start of a round = -(size rounded up to whole turns)
#   EDI = where to enter the loop
        movl    first, %esi
        subl    %ebx, %esi                      # -size
        movl    %esi, %edi
        andl    $-(UNROLL * PAGE), %esi
        subl    %esi, %edi                      # bytes of the first turn to leave out
        shrl    $12, %edi
        imull   $STEP_SIZE, %edi, %edi
        addl    $turn, %edi

# 8N1, and above all DLAB off, without which the data port is the divisor. The rest of a 16550 is fit as reset leaves
# it. Bytes are sent without waiting for the transmitter: emulated ports are always ready, and where one is not, a lost
# 'B' costs nothing, as the counter is the record, while a wait would tie the guest's pace to whoever reads the port.
        movw    $COM1_LCR, %dx
        movb    $0x03, %al
        outb    %al, %dx
        movw    $COM1_DATA, %dx

        movl    $STARTED_MAGIC, STARTED
        movb    $'A', %al
        outb    %al, %dx

round:
        movl    %esi, %eax
        jmp     *%edi

# One instruction reads, adds and writes: a stopped processor is before it or after it. {disp32} keeps the first step,
# whose displacement is 0, as long as the others.
turn:
        .set    displacement, 0
        .rept   UNROLL
        {disp32} incb displacement(%ebx, %eax)
        .set    displacement, displacement + PAGE
        .endr
turn_end:
        .if     (turn_end - turn) - UNROLL * STEP_SIZE
        .error  "an unrolled step is not STEP_SIZE bytes long"
        .endif
        addl    $(UNROLL * PAGE), %eax
        jnz     turn

        addl    $1, ROUNDS
        adcl    $0, ROUNDS + 4
        movb    $'B', %al
        outb    %al, %dx
        jmp     round

        .org    446                             # the partition table
        .org    510
        .byte   0x55, 0xaa
