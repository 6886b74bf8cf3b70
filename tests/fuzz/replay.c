/* Runs a fuzz target on the files named on the command line, where there is no libFuzzer. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
    for (int k = 1; k < argc; k++) {
        FILE *file = fopen(argv[k], "rb");
        size_t room = 1 << 20;
        uint8_t *bytes = malloc(room), *exact;
        if (!file || !bytes) return 2;
        size_t size = fread(bytes, 1, room, file);
        fclose(file);
        if (!(exact = malloc(size ? size : 1))) return 2;
        for (size_t n = 0; n < size; n++) exact[n] = bytes[n];
        LLVMFuzzerTestOneInput(exact, size); /* at the end of its memory, so that a sanitizer sees what is read behind it */
        free(exact);
        free(bytes);
    }
    printf("%d files\n", argc - 1);
    return 0;
}
