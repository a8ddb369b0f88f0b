import java.io.File;

/** A bundle's Kotlin, on a plain JVM: Phone BUNDLE OUT SERVER. */
public final class Phone {
    public static void main(String[] given) {
        GoldenKt.golden(new File(given[0]), new File(given[1]), given[2]);
    }
}
