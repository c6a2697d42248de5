/* Runs engine.c on the file that tests/unit/core/test_native.py writes, with each part in a block of its own, so that
   a sanitizer sees every read outside of it. Writes the logits (B, vocab_size) after reading the tokens one by one, and
   then after reading them all at once. */

#include "../../core/engine.c"
#include <stdio.h>
#include <stdlib.h>

static void *read_block(FILE *file, size_t n_bytes) {
    void *block = NULL;
    if (posix_memalign(&block, 64, n_bytes) || fread(block, 1, n_bytes, file) != n_bytes) exit(1);
    return block;
}

int main(int n_arguments, char **arguments) {
    FILE *file = fopen(arguments[n_arguments - 1], "rb");
    Config *config = read_block(file, sizeof(Config));
    int32_t *sizes = read_block(file, 4 * sizeof(int32_t));  // sequences, tokens of each, threads, size of the table
    int B = sizes[0], T = sizes[1];
    void *weights = read_block(file, weights_size(config));
    float *table = read_block(file, sizes[3]);
    int32_t *tokens = read_block(file, sizeof(int32_t) * B * T);  // (B, T)

    void *memory = NULL;
    if (posix_memalign(&memory, 64, engine_size(config, B, sizes[2]))) return 1;
    Engine *e = engine_open(memory, config, weights, B, sizes[2]);
    for (int i = 0; i < sizes[3] / 4; i++) position_table(e)[i] = table[i];

    size_t n_logits = (size_t)B * config->vocab_size;
    float *logits = malloc(n_logits * sizeof(float));
    int32_t *column = malloc(B * sizeof(int32_t));
    for (int t = 0; t < T; t++) {
        for (int b = 0; b < B; b++) column[b] = tokens[b * T + t];
        forward(e, column, B, 1, t, logits);
    }
    fwrite(logits, sizeof(float), n_logits, stdout);
    forward(e, tokens, B, T, 0, logits);
    fwrite(logits, sizeof(float), n_logits, stdout);

    engine_close(e);
    free(memory), free(logits), free(column), free(config), free(sizes), free(weights), free(table), free(tokens);
    fclose(file);
    return 0;
}
