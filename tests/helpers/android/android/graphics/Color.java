package android.graphics;

public final class Color {
    public static final int BLACK = 0xFF000000;
}
