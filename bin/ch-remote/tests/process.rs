//! Tests the program as a process.

#[test]
fn manual_pages_and_completions_are_written() {
    program_docs::expect_written(
        env!("CARGO_BIN_EXE_ch-remote"),
        &[
            ("man/man1/ch-remote.1", r"api\-socket"),
            ("man/man1/ch-remote-reclaim-stats.1", "watch"),
            ("bash-completion/completions/ch-remote", "--balloon"),
            ("zsh/site-functions/_ch-remote", "--balloon"),
            ("fish/vendor_completions.d/ch-remote.fish", "-l balloon"),
        ],
    );
}
